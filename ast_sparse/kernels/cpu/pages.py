"""Tensors in huge pages, if Linux grants them: they are read faster, and touched for the first time much faster."""

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ast_sparse.kernels.cpu import setting

_HUGE = 1 << 22  # a tensor of this many bytes or more asks for huge pages
_PAGEOUT = 21  # MADV_PAGEOUT, which Python does not name


def ask_for_huge_pages(tensor: Tensor) -> Tensor:
    """The new tensor, which nothing has written to yet."""
    if tensor.nbytes >= _HUGE:
        _advise(tensor, mmap.MADV_HUGEPAGE)
    return tensor


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy in huge pages, for weights that are read for each token; a small tensor is returned as it is.

    What is copied is not read again. If it is a part of a mapped file, its pages are given back, because the mapping
    stays as long as the model has another tensor of the file.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < _HUGE or not setting.is_enabled():
        return tensor
    copied = ask_for_huge_pages(torch.empty_like(tensor, memory_format=torch.contiguous_format)).copy_(tensor)
    if tensor.is_contiguous():
        _advise(tensor, _PAGEOUT)
    return copied


def _advise(tensor: Tensor, advice: int) -> None:
    """Tell Linux about the whole pages of a contiguous tensor; only a hint, which keeps their content."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    whole_pages = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise()(start, whole_pages, advice)


@cache
def _madvise() -> Callable[[int, int, int], int]:
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
