"""Memory of this process: what it holds, and the most it held."""

import contextlib
import resource
import sys
from pathlib import Path

import torch


def resident_bytes(key: str = "VmRSS") -> int:
    """Resident memory now (`VmRSS`), or its high-water mark (`VmHWM`); always the mark where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def reset_peak() -> None:
    """Start to look for the peak anew: of CUDA memory if this process has used a GPU, otherwise of resident memory."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the mark covers the whole process
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak since `reset_peak`: what torch allocated on a GPU if this process has used one, or resident memory."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")
