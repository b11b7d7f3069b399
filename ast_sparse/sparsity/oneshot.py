"""One-shot pruning: magnitude, Wanda and SparseGPT (paper Sec. 6), layer by layer.

A method is a function and its entry in `METHODS`; its name and a line of help are in `config/sparsity.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ast_sparse.config import CalibrationConfig
from ast_sparse.config.sparsity import Method
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import Pattern, nm_mask
from ast_sparse.sparsity.statistics import InputStatistics

_SETTLED = 0.25  # largest initial value of a pruned weight, as a share of the smallest kept one in its group


@dataclass(frozen=True)
class PrunedLayer:
    """The result of pruning one weight, all `[out, in]`.

    Attributes:
        weight: from SparseGPT, updated and zero where pruned; otherwise the given weight.
        mask: bool, True = kept.
        error: relative squared error of the layer's output on the calibration text, `‖(W − W̃)X‖² / ‖WX‖²`; without the
            products of different columns for a method that uses norms, and without X for one that needs no text.
    """

    weight: Tensor
    mask: Tensor
    error: float


def wanda_mask(weight: Tensor, input_norm: Tensor, n: int = 2, m: int = 4, structured: bool = True) -> Tensor:
    """Keep the highest `|W_ij| · ‖x_j‖₂` of every group of a row (Sun et al. 2024).

    Args:
        weight: `[out, in]`, any float dtype; scores are computed in float32 or wider.
        input_norm: `[in]`, norm of each input column over the calibration tokens.
        n, m: the pattern; without groups (`structured` False) `n/m` of each row is kept, as published.

    Raises:
        ValueError: shapes or pattern do not fit.
    """
    if input_norm.shape != weight.shape[1:]:
        raise ValueError(f"input_norm {tuple(input_norm.shape)} does not fit weight {tuple(weight.shape)}.")
    wide = torch.promote_types(weight.dtype, torch.float32)  # 16 bits would make ties, and norms may be too large
    scores = weight.abs().to(wide) * input_norm.to(wide)
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
    """Prune column by column and compensate each error in the columns to the right (Frantar & Alistarh 2023).

    Input columns that are always zero (a zero on the diagonal) get weight 0, and 1 on the diagonal, as published.

    Args:
        weight: `[out, in]`; computed in float32 or wider.
        hessian: `[in, in]`, `X Xᵀ` up to a factor.
        n, m: the pattern; without groups (`structured` False) `n/m` of each block of columns, less one weight, is
            kept, as published.
        block_size: columns between two updates of all remaining columns; rounded up to whole groups.
        damping: share of the mean of the diagonal that is added to the diagonal.
        keep_zeros: zeros of `weight` are pruned first and stay 0, even if the mask keeps one because its group has
            fewer than `n` other weights. The columns to the right compensate for them as for any pruned weight.

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
    inverse = inverse_factor(hessian.to(work.dtype), dead, damping)
    mask = torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
    step = -(-block_size // m) * m if structured else block_size
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        block, kept, factor = work[:, start:stop], mask[:, start:stop], inverse[start:stop, start:stop]
        given = zeros[:, start:stop]
        saliency = factor.diagonal().square()
        if not structured:
            scores = torch.where(given, -1, block.square() / saliency)
            pruned = int(scores.numel() * (1 - n / m)) + 1
            # not kthvalue, which a GPU refuses under `full_determinism`
            threshold = scores.flatten().topk(pruned, largest=False, sorted=False).values.max()
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


def inverse_factor(hessian: Tensor, dead: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, `[in, in]`.

    Args:
        hessian: `[in, in]`, `X Xᵀ` up to a factor.
        dead: `[in]`, bool, columns that get 1 on the diagonal.
        damping: share of the mean of the diagonal that is added to the diagonal.

    Raises:
        ValueError: the damped Hessian is not positive definite.
    """
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


@dataclass(frozen=True)
class OneShotMethod:
    """A method, for all code that selects one by name.

    Attributes:
        prune: gets the weight `[out, in]`, the pattern, the statistics of the inputs (None without text) and the
            settings in `calibration`; returns the new weight and the mask, or raises UserError with reason and fix.
        needs: its input: only `weights`, or from the calibration text the `norms` of the input columns or the whole
            `hessian`.
        by_magnitude: whether the mask is that of |W|, like the refreshes in training. To make masks of other methods
            last, their pruned weights start smaller (`settle`).
    """

    prune: Callable[[Tensor, Pattern, Any, CalibrationConfig], tuple[Tensor, Tensor]]
    needs: Literal["weights", "norms", "hessian"]
    by_magnitude: bool = False

    @property
    def needs_text(self) -> bool:
        """Whether it uses activations."""
        return self.needs != "weights"

    @property
    def needs_hessian(self) -> bool:
        """Whether it needs their second moments rather than norms."""
        return self.needs == "hessian"


def _magnitude(
    weight: Tensor, pattern: Pattern, statistics: None, settings: CalibrationConfig
) -> tuple[Tensor, Tensor]:
    return weight, pattern.mask(weight.abs())


def _wanda(
    weight: Tensor, pattern: Pattern, statistics: InputStatistics, settings: CalibrationConfig
) -> tuple[Tensor, Tensor]:
    return weight, wanda_mask(weight, statistics.input_norm, pattern.n, pattern.m, pattern.structured)


def _sparsegpt(
    weight: Tensor, pattern: Pattern, statistics: InputStatistics, settings: CalibrationConfig
) -> tuple[Tensor, Tensor]:
    assert statistics.hessian is not None, "SparseGPT's statistics are collected with it"
    try:
        return sparsegpt_prune(
            weight,
            statistics.hessian,
            pattern.n,
            pattern.m,
            settings.block_size,
            settings.damping,
            structured=pattern.structured,
            keep_zeros=settings.keep_zeros,
        )
    except ValueError as error:
        fix = "Raise calibration.damping, or calibrate on more text."
        raise UserError(f"{error}. {fix}", "calibration.damping") from None


METHODS: dict[Method, OneShotMethod] = {
    "magnitude": OneShotMethod(_magnitude, needs="weights", by_magnitude=True),
    "wanda": OneShotMethod(_wanda, needs="norms"),
    "sparsegpt": OneShotMethod(_sparsegpt, needs="hessian"),
}


@torch.no_grad()
def prune_weight(
    name: str,
    weight: Tensor,
    method: Method,
    pattern: Pattern,
    statistics: InputStatistics | None = None,
    calibration: CalibrationConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight and the mask that a method computes for one weight, all `[out, in]`.

    Args:
        name: of the layer, for messages.
        statistics: of the inputs, for a method that needs text; without them, and on the meta device, the weight is
            pruned by magnitude.
        calibration: settings of the method.

    Raises:
        UserError: activations are not finite, or the method fails (SparseGPT's Hessian cannot be inverted).
    """
    chosen, settings = METHODS[method], calibration or CalibrationConfig()
    seen = statistics if chosen.needs_text else None
    if weight.is_meta or (chosen.needs_text and seen is None):
        return _magnitude(weight, pattern, None, settings)
    if seen is not None and not torch.isfinite(seen.squares).all():
        raise UserError(f"`{name}` gets inputs that are not finite. Check the model, or load it in float32.")
    try:
        return chosen.prune(weight, pattern, seen, settings)
    except ValueError as error:
        raise UserError(f"`{name}`: {error}", *getattr(error, "fields", ())) from None


@torch.no_grad()
def prune_layer(
    name: str,
    weight: Tensor,
    method: Method,
    pattern: Pattern,
    statistics: InputStatistics | None = None,
    calibration: CalibrationConfig | None = None,
) -> PrunedLayer:
    """`prune_weight`, and the error of the layer's output (meta device: 0); arguments and exceptions are the same."""
    new, mask = prune_weight(name, weight, method, pattern, statistics, calibration)
    if weight.is_meta:
        return PrunedLayer(new, mask, 0.0)
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # sums of squares are too large for float16
    change = weight - torch.where(mask, new, 0)
    if statistics is None or not METHODS[method].needs_text:
        error = _relative(change.square(), weight.square())
    elif METHODS[method].needs_hessian and statistics.hessian is not None:
        hessian = statistics.hessian.to(weight.dtype)
        error = _relative((change @ hessian) * change, (weight @ hessian) * weight)
    else:
        squares = statistics.squares.to(weight.dtype)
        error = _relative(change.square() @ squares, weight.square() @ squares)
    return PrunedLayer(new, mask, error)


def _relative(error: Tensor, whole: Tensor) -> float:
    return float(error.sum() / whole.sum().clamp(min=torch.finfo(torch.float32).tiny))


def settle(weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Shrink pruned weights below the smallest kept one of their group, so that the first refreshes keep the mask.

    Otherwise they would undo a mask that is not by magnitude. Without groups the row is the group.

    Args:
        weight, mask: `[out, in]`.
    """
    width = pattern.m if pattern.structured else weight.shape[1]
    groups, kept = weight.unflatten(1, (-1, width)), mask.unflatten(1, (-1, width))
    limit = _SETTLED * torch.where(kept, groups.abs(), torch.inf).amin(-1, keepdim=True)
    return torch.where(kept, groups, torch.minimum(torch.maximum(groups, -limit), limit)).flatten(1)
