"""Memory that a training step on a CPU has freed, given back to the system.

What glibc keeps of the temporaries of a forward pass fits few of the tensors that come next: beside the activations of
a 135M model it is another quarter of them.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch


def give_back(device: torch.device) -> None:
    """Give the free blocks of the heap back, where the model is on a CPU and the C library is glibc."""
    trim = _malloc_trim()
    if device.type == "cpu" and trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
    return trim
