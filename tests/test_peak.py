"""Peak memory of this process."""

import mmap

import pytest
import torch

from ast_sparse.peak import highest_resident_bytes, peak_bytes, reset_peak, resident_bytes


def test_the_peak_is_seen_after_it_is_freed_and_forgotten_at_the_next_start() -> None:
    reset_peak()
    held = resident_bytes()
    with mmap.mmap(-1, 60_000_000) as block:  # a freed block of the heap may stay with the process
        block.write(bytes([1]) * len(block))
    assert peak_bytes() - held > 50e6
    reset_peak()
    assert peak_bytes() - held < 30e6
    assert highest_resident_bytes() - held > 50e6


def test_the_peak_of_a_gpu_is_what_torch_allocated_there_and_leaves_the_resident_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name) or 7)
    before = peak_bytes(on_gpu=False)
    reset_peak(on_gpu=True)
    assert peak_bytes(on_gpu=True) == 7 and peak_bytes(on_gpu=False) >= before
    assert calls == ["synchronize", "reset_peak_memory_stats", "synchronize", "max_memory_allocated"]


def test_a_gpu_that_is_not_used_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    reset_peak()
    assert peak_bytes() > 10e6
