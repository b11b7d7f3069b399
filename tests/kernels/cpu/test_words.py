"""The code by words; `tests/kernels/test_code24.py` compares it with its slow twin."""

import mmap

import pytest
import torch

from ast_sparse.kernels.code24 import pack24, unpack24
from ast_sparse.kernels.cpu import pages, setting, words
from ast_sparse.sparsity.masks import nm_mask


def test_words_and_the_plain_way_return_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, mask = torch.randn(64, 128).bfloat16(), nm_mask(torch.rand(64, 128))
    results = []
    for enabled in (False, True):
        monkeypatch.setattr(setting, "is_enabled", lambda enabled=enabled: enabled)
        assert words.take(weight) is enabled
        values, meta = pack24(weight, mask)
        results.append((values.view(torch.int16), meta, unpack24(values, meta).view(torch.int16)))
    assert all(torch.equal(plain, by_words) for plain, by_words in zip(*results, strict=True))


def test_other_dtypes_and_gradients_use_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "is_enabled", lambda: True)
    assert words.take(torch.ones(1, 8).bfloat16())
    assert not words.take(torch.ones(1, 8)) and not words.take(torch.ones(0, 8).bfloat16())
    assert not words.take(torch.ones(1, 8).bfloat16().requires_grad_())
    assert not words.take(torch.empty(1, 8, dtype=torch.bfloat16, device="meta"))


def test_huge_pages_are_asked_for_whole_pages_of_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *args: calls.append(args))
    monkeypatch.setattr(setting, "is_enabled", lambda: True)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)  # only Linux has it
    weight, mask = torch.randn(2048, 2048).bfloat16(), nm_mask(torch.rand(2048, 2048))
    values, meta = pack24(weight, mask)  # values of 4 MiB, metadata of 0.5
    dense = unpack24(values, meta)
    assert torch.equal(dense, torch.where(mask, weight, 0)) and len(calls) == 2
    for tensor, (start, length, advice) in zip((values, dense), calls, strict=True):
        assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0 and advice == mmap.MADV_HUGEPAGE
        assert 0 <= start - tensor.data_ptr() < mmap.PAGESIZE
        assert 0 <= tensor.data_ptr() + tensor.nbytes - start - length < mmap.PAGESIZE
    monkeypatch.setattr(setting, "is_enabled", lambda: False)
    assert torch.equal(unpack24(values, meta), dense)
