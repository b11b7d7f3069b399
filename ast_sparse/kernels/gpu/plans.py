"""How the kernels of `triton24.py` are launched: which kernel, how much a program does, in how many parts."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from ast_sparse.kernels.gpu import triton24
from ast_sparse.kernels.gpu.dispatch import is_interpreted

_WAVES = 3  # programs wanted for each multiprocessor, so that enough loads are under way
_FINISHED = (16, 64, 32)  # tokens, rows and columns of S of a step of `finish`


@dataclass(frozen=True)
class Plan:
    """One way to launch `vectors` or `tiles`.

    Attributes:
        kernel: `vectors`, for up to 4 tokens, or `tiles`.
        tokens: of a program; `vectors` has 1, 2 or 4, `tiles` 16, 32 or 64.
        rows: of a program.
        units: of a step, each of eight columns. In `vectors` below the number of threads, see `triton24.py`.
        warps: of a program.
        parts: shares of the columns, each computed by programs of its own. They are added by a second kernel in a fixed
            order, so the result is the same in every call.
    """

    kernel: str
    tokens: int
    rows: int
    units: int
    warps: int
    parts: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.rows}x{8 * self.units}, {self.parts} part{'s' * (self.parts > 1)}"


@cache
def plans(tokens: int, out_features: int, in_features: int, dtype: torch.dtype, processors: int) -> tuple[Plan, ...]:
    """The plans worth trying, the best guess first.

    Args:
        processors: multiprocessors of the GPU.
    """
    width = min(max(16, triton.next_power_of_2(tokens)), 64)
    sizes = [("tiles", width, 64, 16, 4), ("tiles", width, 64, 8, 4), ("tiles", width, 32, 16, 4)]
    if dtype.itemsize == 4:
        # from 64 rows on, Triton 3.6 and 3.7 multiply float32 as TF32 on compute capability 10.0, whatever is asked for
        sizes = [("tiles", width, 32, 8, 4), ("tiles", width, 32, 16, 4)]
    # By the instructions in the compiled loops, `vectors` keeps up with memory at one token and just about at two;
    # `tiles` takes the same for any number up to its width.
    if tokens == 1:
        sizes = [("vectors", 1, 8, 64, 4), ("vectors", 1, 16, 64, 4), ("vectors", 1, 16, 128, 8)]
    elif tokens == 2:
        sizes = [("vectors", 2, 8, 64, 4), ("vectors", 2, 16, 64, 4), sizes[0]]
    elif tokens <= 4:
        sizes = [*sizes[:2], ("vectors", 4, 8, 64, 4)]
    return tuple(Plan(*size, parts=_parts(*size[1:4], tokens, out_features, in_features, processors)) for size in sizes)


def _parts(width: int, rows: int, units: int, tokens: int, out_features: int, in_features: int, processors: int) -> int:
    programs = triton.cdiv(out_features, rows) * triton.cdiv(tokens, width)
    steps = triton.cdiv(in_features // 8, units)
    parts = 1
    while programs * parts < _WAVES * processors and 2 * parts <= steps:
        parts *= 2
    return parts


def product(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    plan: Plan,
    thin: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`x Wᵀ + b`, and `+ t Sᵀ`, rounded once.

    Args:
        x: `[tokens, in]`; values `[out, in/2]`; meta `[out, in/8]`; bias `[out]`: contiguous.
        thin: S `[out, rank]` and t `[tokens, rank]`, both contiguous and of the dtype of x.
    """
    tokens = len(x)
    out_features, units = meta.shape
    is_whole = plan.parts == 1 and thin is None
    out = x.new_empty(tokens, out_features)
    parts = out if is_whole else x.new_empty(plan.parts, tokens, out_features, dtype=torch.float32)
    has_bias = bias is not None
    options = {"AS_FLOAT": is_interpreted()} if plan.kernel == "tiles" else {}
    grid = (triton.cdiv(out_features, plan.rows), plan.parts, triton.cdiv(tokens, plan.tokens))
    getattr(triton24, plan.kernel)[grid](
        x, values, meta, bias if has_bias else x, parts, out_features, units, tokens,
        HAS_BIAS=has_bias and is_whole, TOKENS=plan.tokens, ROWS=plan.rows, UNITS=plan.units, PARTS=plan.parts,
        STEPS=triton.cdiv(units, plan.parts * plan.units), num_warps=plan.warps, **options,
    )  # fmt: skip
    if not is_whole:
        width, rows, columns = _FINISHED
        s, t = thin or (x, x)
        rank = t.shape[1] if thin is not None else 0
        triton24.finish[(triton.cdiv(out_features, rows), triton.cdiv(tokens, width))](
            parts, bias if has_bias else x, s, t, out, out_features, tokens, rank,
            HAS_BIAS=has_bias, HAS_THIN=thin is not None, TOKENS=width, ROWS=rows, RANK=columns, PARTS=plan.parts,
            STEPS=triton.cdiv(rank, columns), AS_FLOAT=is_interpreted(), num_warps=4,
        )  # fmt: skip
    return out
