"""Peak memory of this process."""

import pytest
import torch

from ast_sparse.speed.peak import peak_bytes, reset_peak, resident_bytes


def test_the_peak_is_seen_after_it_is_freed_and_forgotten_at_the_next_start() -> None:
    reset_peak()
    held = resident_bytes()
    block = bytearray(60_000_000)
    del block
    assert peak_bytes() - held > 50e6
    reset_peak()
    assert peak_bytes() - held < 30e6


def test_a_gpu_that_is_not_used_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    reset_peak()
    assert peak_bytes() > 10e6
