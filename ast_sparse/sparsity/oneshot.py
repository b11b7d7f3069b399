"""One-shot pruning: magnitude, Wanda and SparseGPT (paper Sec. 6), layer by layer."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ast_sparse.config import CalibrationConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import Pattern, nm_mask
from ast_sparse.sparsity.statistics import InputStatistics

Method = Literal["magnitude", "wanda", "sparsegpt"]

_SETTLED = 0.25  # of the smallest kept weight of its group: how large a pruned one may start


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning makes of one weight, all `[out, in]`.

    Attributes:
        weight: SparseGPT's has moved, with zeros where it is pruned; else the given weight.
        mask: bool, True = kept.
        error: relative squared error of the layer's output on the calibration text, `‖(W − W̃)X‖² / ‖WX‖²`; of Wanda
            without the products of different columns, of magnitude without X.
    """

    weight: Tensor
    mask: Tensor
    error: float


def wanda_mask(weight: Tensor, input_norm: Tensor, n: int = 2, m: int = 4, structured: bool = True) -> Tensor:
    """Keep the highest `|W_ij| · ‖x_j‖₂` of every group of a row (Sun et al. 2024).

    Args:
        weight: `[out, in]`, any float dtype.
        input_norm: `[in]`, norm of each input column over the calibration tokens.
        n, m: the pattern; without groups (`structured` False) `n/m` of each row is kept, as published.

    Raises:
        ValueError: shapes or pattern do not fit.
    """
    if input_norm.shape != weight.shape[1:]:
        raise ValueError(f"input_norm {tuple(input_norm.shape)} does not fit weight {tuple(weight.shape)}.")
    scores = weight.abs() * input_norm.to(weight.dtype)
    columns = weight.shape[1]
    return nm_mask(scores, n, m) if structured else nm_mask(scores, columns * n // m, columns)


def sparsegpt_prune(
    weight: Tensor,
    hessian: Tensor,
    n: int = 2,
    m: int = 4,
    block_size: int = 128,
    damping: float = 0.01,
    structured: bool = True,
    keep_zeros: bool = False,
) -> tuple[Tensor, Tensor]:
    """Prune column by column and push each error into the columns to the right (Frantar & Alistarh 2023).

    Input columns that are always zero (a zero on the diagonal) get weight 0, and 1 on the diagonal, as published.

    Args:
        weight: `[out, in]`; computed in float32 or wider.
        hessian: `[in, in]`, `X Xᵀ` up to a factor.
        n, m: the pattern; without groups (`structured` False) `n/m` of each block of columns is kept, as published.
        block_size: columns between two updates of all the rest; rounded up to whole groups.
        damping: share of the mean diagonal that is added to the diagonal.
        keep_zeros: what is 0 in `weight` is pruned first and stays 0, also where the mask keeps it because a group has
            fewer than `n` other weights. The columns to the right make up for it as for any pruned weight.

    Returns:
        The new weight, dtype of `weight`, exactly 0.0 where pruned, and the mask (bool, True = kept).

    Raises:
        ValueError: shapes or pattern do not fit, or the damped Hessian is not positive definite.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian {tuple(hessian.shape)} does not fit weight {tuple(weight.shape)}.")
    if structured and (not 0 < n < m or columns % m):
        raise ValueError(f"Cannot build an {n}:{m} mask: {columns} columns are not a multiple of {m}.")
    work = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    zeros = (work == 0) if keep_zeros else torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
    dead = hessian.diagonal() == 0
    work[:, dead] = 0
    inverse = _inverse_factor(hessian.to(work.dtype), dead, damping)
    mask = torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
    step = -(-block_size // m) * m if structured else block_size
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        block, kept, factor = work[:, start:stop], mask[:, start:stop], inverse[start:stop, start:stop]
        given = zeros[:, start:stop]
        saliency = factor.diagonal().square()
        if not structured:
            scores = torch.where(given, -1, block.square() / saliency)
            threshold = scores.flatten().kthvalue(int(scores.numel() * (1 - n / m)) + 1).values
            kept.copy_(scores > threshold)
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            if structured and i % m == 0:
                group = slice(i, i + m)
                scores = block[:, group].square() / saliency[group]
                kept[:, group] = nm_mask(torch.where(given[:, group], -1, scores), n, m)
            column = block[:, i]
            errors[:, i] = torch.where(kept[:, i] & ~given[:, i], 0, column) / factor[i, i]
            block[:, i + 1 :] -= errors[:, i : i + 1] @ factor[i : i + 1, i + 1 :]
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    return torch.where(mask & ~zeros, work, 0).to(weight.dtype), mask


def _inverse_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean()
    lower, fault = torch.linalg.cholesky_ex(damped)
    if not fault:
        upper, fault = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if fault or not torch.isfinite(upper).all():
        raise ValueError(f"the Hessian with damping={damping} is not positive definite")
    return upper


@torch.no_grad()
def prune_layer(
    name: str,
    weight: Tensor,
    method: Method,
    pattern: Pattern,
    statistics: InputStatistics | None = None,
    calibration: CalibrationConfig | None = None,
) -> PrunedLayer:
    """Prune one weight `[out, in]` by a method; `statistics` of its inputs for wanda and sparsegpt.

    Raises:
        UserError: activations are not finite, or SparseGPT's Hessian cannot be inverted; names the layer.
    """
    if method == "magnitude" or statistics is None:
        mask = pattern.mask(weight.abs())
        return PrunedLayer(weight, mask, _relative(torch.where(mask, 0, weight).square(), weight.square()))
    if not torch.isfinite(statistics.squares).all():
        raise UserError(f"`{name}` gets inputs that are not finite. Check the model, or load it in float32.")
    groups = (pattern.n, pattern.m)
    if method == "wanda":
        mask = wanda_mask(weight, statistics.input_norm, *groups, structured=pattern.structured)
        squares = statistics.squares.to(weight.dtype)
        pruned = torch.where(mask, 0, weight).square()
        return PrunedLayer(weight, mask, _relative(pruned @ squares, weight.square() @ squares))
    settings = calibration or CalibrationConfig()
    assert statistics.hessian is not None, "SparseGPT's statistics are collected with it"
    hessian = statistics.hessian
    try:
        new, mask = sparsegpt_prune(
            weight,
            hessian,
            *groups,
            settings.block_size,
            settings.damping,
            structured=pattern.structured,
            keep_zeros=settings.keep_zeros,
        )
    except ValueError as error:
        fix = "Raise calibration.damping, or calibrate on more text."
        raise UserError(f"`{name}`: {error}. {fix}", "calibration.damping") from None
    change, hessian = weight - new, hessian.to(weight.dtype)
    return PrunedLayer(new, mask, _relative((change @ hessian) * change, (weight @ hessian) * weight))


def _relative(error: Tensor, whole: Tensor) -> float:
    if error.is_meta:
        return 0.0
    return float(error.sum() / whole.sum().clamp(min=torch.finfo(torch.float32).tiny))


def settle(weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Shrink pruned weights below the smallest kept one of their group, so that the first refreshes keep the mask.

    A mask that is not magnitude's would be undone otherwise. Without groups the row is the group.

    Args:
        weight, mask: `[out, in]`.
    """
    width = pattern.m if pattern.structured else weight.shape[1]
    groups, kept = weight.unflatten(1, (-1, width)), mask.unflatten(1, (-1, width))
    limit = _SETTLED * torch.where(kept, groups.abs(), torch.inf).amin(-1, keepdim=True)
    return torch.where(kept, groups, torch.minimum(torch.maximum(groups, -limit), limit)).flatten(1)
