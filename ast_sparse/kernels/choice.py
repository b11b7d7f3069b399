"""Whether a run uses compiled or eager kernels: chosen once, logged once, saved in its checkpoints."""

import logging
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch

from ast_sparse.errors import UserError

logger = logging.getLogger(__name__)

Kernels = Literal["eager", "compiled"]

# Compiling takes 10 to 30 seconds the first time; below this many masked weights eager kernels cost less than that.
WORTHWHILE = 10_000_000


def compile_kernel(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` of a pure function for all sizes; one worker, because a kernel is one small graph.

    Numbers that the function has from outside are constants of the kernel; those that change come in a tensor.

    Args:
        options: more settings of the inductor.
    """
    compiled = torch.compile(function, dynamic=True, fullgraph=True, options={"compile_threads": 1, **options})

    def kernel(*args: Any) -> Any:
        # dynamo limits the graphs of one source line: patterns, placements, dtypes and ranks of tensors share it.
        # Without the second setting it makes tensors of floats, in float64 and in host memory.
        with torch._dynamo.config.patch(recompile_limit=64, specialize_float=True):
            return compiled(*args)

    return kernel


def choose_kernels(
    setting: Literal["auto", "eager", "compiled"],
    weights: int,
    device: torch.device,
    stored: Kernels | None = None,
) -> Kernels:
    """The kernels of a run.

    Args:
        setting: `sparsity.kernels`. `auto` is what the checkpoint was trained with; in a new run it is compiled if a
            compiler works and there are enough masked weights to make compiling worthwhile.
        weights: number of masked weights.
        stored: the choice in the checkpoint that is resumed.

    Raises:
        UserError: `compiled` is asked for, but compiling fails here.
    """
    choice = setting if setting != "auto" else stored or ("compiled" if weights >= WORTHWHILE else "eager")
    if choice == "compiled" and (fault := compiler_fault(device.type)):
        if setting == "compiled":
            raise UserError(f"sparsity.kernels='compiled' fails here: {fault}. Set auto or eager.")
        logger.warning(f"Kernels are eager, because compiling them fails here: {fault}.")
        choice = "eager"
    if stored is not None and choice != stored:
        logger.warning(
            f"The checkpoint was trained with {stored} kernels, this run continues with {choice} ones: its steps are "
            "equal within rounding, not to the bit."
        )
    return choice


@cache
def compiler_fault(device_type: str) -> str | None:
    """Why kernels cannot be compiled for a device, in one line; None if they can. Tried once per process."""
    started = time.perf_counter()
    try:
        probe = torch.arange(64.0, device=device_type)
        doubled = compile_kernel(_probe)(probe)
        if not torch.equal(doubled, probe * 2 + 1):
            return "a compiled function returns wrong results"
    except Exception as error:  # no compiler, an unsupported Python, a full disk: anything that the inductor raises
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}".rstrip(".")
    logger.info(f"Kernels are compiled for {device_type} (first one in {time.perf_counter() - started:.1f} s).")
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
