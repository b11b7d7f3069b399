"""4-bit values: a symmetric grid for every 128 columns of a row, and its 2:4 code.

The grid of a group is `q · scale`, q from -8 to 7. The scale has the sign that gives -8 to the weight of the largest
magnitude, so that all sixteen steps are used. A zero stays exactly 0.0.

Coded, a row has two nibbles of q for each group of four columns, the first one in the low half of its byte; q is
stored as a two's complement. Positions are those of `code24.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ast_sparse.kernels.code24 import pack24, unpack24
from ast_sparse.kernels.linear24 import linear24

GROUP = 128  # columns that share a scale
_LOWEST, _HIGHEST = -8, 7
# A smaller scale clips the largest weights of a group and is finer for the others.
_SHRINKS = (1.0, 0.9, 0.8)


def round_to_grid(
    weight: Tensor,
    dtype: torch.dtype | None = None,
    importance: Tensor | None = None,
    shrinks: Sequence[float] = _SHRINKS,
) -> tuple[Tensor, Tensor]:
    """The nearest weight on the grid, and its scales; of each group the scale with the least squared error.

    Args:
        weight: `[out, in]`, any float dtype and `in`; the last group may be narrower.
        dtype: of the result and of the scales, default that of the weight; computed in float32.
        importance: `[in]`, weight of a column in the squared error; default: all the same.
        shrinks: scales that are tried, as shares of the one that reaches the largest weight.

    Returns:
        The weight `[out, in]`, each entry `q · scale` rounded to the dtype, and the scales `[out, ceil(in/128)]`.
    """
    dtype = dtype or weight.dtype
    groups = _grouped(weight.float())
    factors = None if importance is None else _grouped(importance.float()[None])
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = steps = scale = None
    for shrink in shrinks:
        tried = (largest / _LOWEST * shrink).to(dtype).float()
        q = (groups / torch.where(tried == 0, 1, tried)).round_().clamp_(_LOWEST, _HIGHEST)
        error = (q * tried - groups).square_()
        error = (error if factors is None else error * factors).sum(-1, keepdim=True)
        if best is None or steps is None or scale is None:
            best, steps, scale = error, q, tried
        else:
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
            steps = torch.where(better, q, steps)
    assert steps is not None and scale is not None, "there is a scale to try"
    rounded = _on_grid(steps.to(dtype), scale.to(dtype)).flatten(1)[:, : weight.shape[1]]
    return rounded.contiguous(), scale.to(dtype).squeeze(-1)


def round_with_feedback(
    weight: Tensor, dtype: torch.dtype, importance: Tensor | None, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """A weight on the grid, and its scales: column by column, errors go to the columns to the right (GPTQ).

    Zeros stay zeros; a pruned column passes on what earlier columns gave it, as in SparseGPT. Each group gets its scale
    when its first column is reached. The weight that a scale comes from takes the step -8 in any case, so the largest
    step of a group is always 8, and rounding the result again does not change it.

    Args:
        weight: `[out, in]`, computed in float32.
        dtype, importance: as in `round_to_grid`.
        factor: `[in, in]`, the upper Cholesky factor of the inverse Hessian, `inverse_factor` of `sparsity/oneshot.py`.

    Returns:
        As `round_to_grid`.
    """
    work, kept = weight.to(torch.float32, copy=True), weight != 0
    rounded, scales = torch.empty_like(work, dtype=dtype), []
    for start in range(0, work.shape[1], GROUP):
        columns = slice(start, min(start + GROUP, work.shape[1]))
        block, own = work[:, columns], factor[columns, columns]
        current = torch.where(kept[:, columns], block, 0)
        _, scale = round_to_grid(current, dtype, None if importance is None else importance[columns])
        largest, step = current.abs().argmax(-1), scale.squeeze(-1).float()
        errors = torch.zeros_like(block)
        for i in range(block.shape[1]):
            q = (block[:, i] / torch.where(step == 0, 1, step)).round_().clamp_(_LOWEST, _HIGHEST)
            q = torch.where(kept[:, start + i], torch.where(largest == i, _LOWEST, q), 0)
            rounded[:, start + i] = _on_grid(q.to(dtype), step.to(dtype))
            errors[:, i] = (block[:, i] - rounded[:, start + i].float()) / own[i, i]
            block[:, i + 1 :] -= errors[:, i : i + 1] @ own[i : i + 1, i + 1 :]
        work[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        scales.append(scale)
    return rounded, torch.cat(scales, dim=1)


def pack24_int4(weight: Tensor, mask: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Encode a 2:4 weight that is on the grid.

    Args:
        weight: `[out, in]`, from `round_to_grid`, `in` a multiple of 8.
        mask: as in `pack24`.
        scale: `[out, ceil(in/128)]`, the dtype of the weight.

    Returns:
        values `[out, in/4]`, uint8; meta `[out, in/8]`, uint8; the scales.

    Raises:
        ValueError: as in `pack24`, the scales do not fit, or the weight is not on their grid.
    """
    values, meta = pack24(weight, mask)
    if scale.dtype != weight.dtype or scale.shape != (len(weight), -(-weight.shape[1] // GROUP)):
        raise ValueError(f"Scales {scale.dtype} {tuple(scale.shape)} do not fit a weight {tuple(weight.shape)}.")
    spread = _spread(scale, values.shape[1]).float()
    q = (values.float() / torch.where(spread == 0, 1, spread)).round_().clamp_(_LOWEST, _HIGHEST)
    if not torch.equal(_on_grid(q.to(scale.dtype), spread.to(scale.dtype)), values):
        raise ValueError("The weight is not on the 4-bit grid of its scales.")
    nibbles = (q.to(torch.int8) & 15).to(torch.uint8).unflatten(1, (-1, 2))
    return nibbles[..., 0] | nibbles[..., 1] << 4, meta, scale.contiguous()


def unpack_values(values: Tensor, scale: Tensor) -> Tensor:
    """The kept values `[out, in/2]` in the dtype of the scales; arguments as in `unpack24_int4`."""
    nibbles = torch.stack((values & 15, values >> 4), dim=-1).flatten(1).to(torch.int8)
    q = torch.where(nibbles > _HIGHEST, nibbles - 16, nibbles)
    return _on_grid(q.to(scale.dtype), _spread(scale, q.shape[1]))


def unpack24_int4(values: Tensor, meta: Tensor, scale: Tensor) -> Tensor:
    """Decode to the weight `[out, in]` in the dtype of the scales, exactly 0.0 where pruned.

    Args:
        values: `[out, in/4]`, uint8, `in` a multiple of 8.
        meta: `[out, in/8]`, uint8; its nibbles are not checked, see `check_meta`.
        scale: `[out, ceil(in/128)]`.
    """
    return unpack24(unpack_values(values, scale), meta)


def linear24_int4(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    slorb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`x Wᵀ + b`, and `+ S(Xx)`, by `linear24`, which gets the values in 16 bits; all others have one dtype."""
    return linear24(x, unpack_values(values, scale), meta, bias, slorb)


def _grouped(tensor: Tensor) -> Tensor:
    """`[rows, in]` as `[rows, groups, 128]`, with zeros at the end."""
    missing = -tensor.shape[1] % GROUP
    return torch.nn.functional.pad(tensor, (0, missing)).unflatten(1, (-1, GROUP))


def _spread(scale: Tensor, kept: int) -> Tensor:
    """The scale of each kept value, `[out, in/2]`."""
    return scale.repeat_interleave(GROUP // 2, dim=1)[:, :kept]


def _on_grid(q: Tensor, scale: Tensor) -> Tensor:
    """`q · scale` without negative zeros."""
    return torch.where(q == 0, 0, q * scale)
