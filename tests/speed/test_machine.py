"""What a measurement depends on."""

import platform
from pathlib import Path

import torch

from ast_sparse.speed.machine import cpu_name, machine, machine_line
from ast_sparse.speed.peak import peak_bytes, reset_peak, resident_bytes


def test_the_machine_is_named_on_one_line() -> None:
    found = machine()
    line = machine_line(found)
    assert "\n" not in line and cpu_name() in line and torch.__version__ in line
    assert found["threads"] == torch.get_num_threads() and f"{found['threads']} thread" in line


def test_without_proc_the_architecture_stands_for_the_cpu() -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    before, Path.read_text = Path.read_text, missing  # type: ignore[method-assign, assignment]
    try:
        assert cpu_name() == (platform.processor() or platform.machine())
    finally:
        Path.read_text = before  # type: ignore[method-assign]


def test_the_peak_is_seen_after_it_is_freed_and_forgotten_at_the_next_start() -> None:
    reset_peak()
    held = resident_bytes()
    block = bytearray(60_000_000)
    del block
    assert peak_bytes() - held > 50e6
    reset_peak()
    assert peak_bytes() - held < 30e6
