"""Copies of weights in huge pages."""

import mmap

import pytest
import torch

from ast_sparse.kernels.cpu import pages, setting


def test_a_large_tensor_is_copied_into_huge_pages_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *args: calls.append(args))
    monkeypatch.setattr(setting, "is_enabled", lambda: True)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)  # only Linux has it
    large, small = torch.randn(1 << 20), torch.randn(100)
    copy = pages.in_huge_pages(large)
    assert torch.equal(copy, large) and copy.data_ptr() != large.data_ptr() and len(calls) == 1
    assert copy.data_ptr() <= calls[0][0] < copy.data_ptr() + mmap.PAGESIZE
    assert pages.in_huge_pages(small) is small
    on_meta = torch.empty(1 << 20, device="meta")
    assert pages.in_huge_pages(on_meta) is on_meta
    monkeypatch.setattr(setting, "is_enabled", lambda: False)
    assert pages.in_huge_pages(large) is large
    assert len(calls) == 1
