"""Memory that was freed but is kept by an allocator, returned to the system.

On a CPU, glibc keeps freed temporaries, which fit few of the next tensors: for a 135M model that adds half of the
memory of its activations.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from ast_sparse.kernels.cpu import setting

_PARTS = 4  # of the decoder; with more parts a step takes longer and its peak is hardly lower


@contextmanager
def freed_memory_given_back(blocks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, forward and backward passes return free heap memory to the system before, between and after four parts.

    Does nothing if the device is not a CPU, or `setting.is_enabled()` is False.

    Args:
        blocks: the decoder blocks in order.
        device: where they compute.
    """
    if device.type != "cpu" or not setting.is_enabled():
        yield
        return
    trim = _malloc_trim()

    def give_back(*_: Any) -> None:
        trim(0)

    def give_back_either_way(block: nn.Module, args: Any, output: Any) -> None:
        give_back()
        hidden = output[0] if isinstance(output, tuple | list) else output
        if hidden.requires_grad:
            hidden.register_hook(give_back)

    size = -(-len(blocks) // _PARTS)
    handles = [blocks[0].register_forward_pre_hook(give_back)]
    handles += [
        last.register_forward_hook(give_back_either_way) for last in [*blocks[size - 1 : -1 : size], blocks[-1]]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def return_freed_memory(device: torch.device) -> None:
    """Return what torch keeps of freed memory on a GPU, or glibc on a CPU, after work that needed more than the next.

    Does nothing on a CPU if `setting.is_enabled()` is False.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu" and setting.is_enabled():
        _malloc_trim()(0)


@cache
def _malloc_trim() -> Callable[[int], int]:
    trim = ctypes.CDLL(None).malloc_trim
    trim.argtypes = [ctypes.c_size_t]
    return trim
