"""Copies of weights in huge pages."""

import mmap
from pathlib import Path

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
    assert torch.equal(copy, large) and copy.data_ptr() != large.data_ptr()
    assert [advice for *_, advice in calls] == [14, 21]  # huge pages for the copy, the pages of the first given back
    assert copy.data_ptr() <= calls[0][0] < copy.data_ptr() + mmap.PAGESIZE
    assert large.data_ptr() <= calls[1][0] and sum(calls[1][:2]) <= large.data_ptr() + large.nbytes
    assert pages.in_huge_pages(small) is small
    on_meta = torch.empty(1 << 20, device="meta")
    assert pages.in_huge_pages(on_meta) is on_meta
    monkeypatch.setattr(setting, "is_enabled", lambda: False)
    assert pages.in_huge_pages(large) is large
    assert len(calls) == 2


def test_what_was_copied_keeps_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "is_enabled", lambda: True)
    expected = torch.randn(1 << 21)
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=1 << 21)
    for tensor in (mapped.copy_(expected), expected.clone()):  # a part of a file, and memory of the process
        copy = pages.in_huge_pages(tensor)
        assert copy.data_ptr() != tensor.data_ptr()
        assert torch.equal(copy, expected) and torch.equal(tensor, expected)
