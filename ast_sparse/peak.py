"""Memory of this process: what it holds, and the most it held."""

import contextlib
import resource
import sys
from pathlib import Path

import torch

_before_reset = 0  # the highest resident memory that `reset_peak` has made the system forget


def resident_bytes(key: str = "VmRSS") -> int:
    """Resident memory now (`VmRSS`), or its high-water mark (`VmHWM`); always the mark where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def reset_peak(on_gpu: bool | None = None) -> None:
    """Start to look for the peak anew.

    Args:
        on_gpu: whether it is that of CUDA memory, not of resident memory; default: whether this process has used a GPU.
    """
    global _before_reset
    if torch.cuda.is_initialized() if on_gpu is None else on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return
    _before_reset = highest_resident_bytes()
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the mark covers the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(on_gpu: bool | None = None) -> int:
    """The peak since `reset_peak`, whose argument this takes: what torch allocated on a GPU, or resident memory."""
    if torch.cuda.is_initialized() if on_gpu is None else on_gpu:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")


def highest_resident_bytes() -> int:
    """The most resident memory since the process began, whatever `reset_peak` has reset."""
    return max(_before_reset, resident_bytes("VmHWM"))
