"""N:M masks (paper Sec. 3.1) and how they change during training (Sec. 6.7). Masks are boolean, True = kept."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.config import UNSTRUCTURED, SparsityConfig
from ast_sparse.distributed.pieces import whole
from ast_sparse.kernels.nm_masks import nm_group_mask

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd; multiplication by it mixes bits well
_ROW = 1024  # words of eight positions


def nm_mask(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of the last dimension.

    Args:
        scores: `[..., columns]`, any real dtype, higher is more important; no NaN (NaN has no order).
        n, m: the pattern, `0 < n < m`; `columns` must be a multiple of `m`.

    Returns:
        Boolean mask of the shape of `scores`, exactly `n` True in each group. Ties keep the lower column.

    Raises:
        ValueError: the pattern is not `0 < n < m`, or `columns` is not a multiple of `m`.
    """
    if not 0 < n < m:
        raise ValueError(f"N:M pattern {n}:{m} needs 0 < N < M.")
    if scores.shape[-1] % m:
        raise ValueError(f"Cannot build an {n}:{m} mask: {scores.shape[-1]} columns are not a multiple of {m}.")
    return nm_group_mask(scores.reshape(-1, scores.shape[-1]), n, m).view(scores.shape)


def check_nm(weight: Tensor, n: int, m: int, dim: int = -1) -> bool:
    """Whether every group of `m` consecutive entries along `dim` has at most `n` non-zeros.

    Args:
        weight: weight `[out, in]` (or `[in, out]` with `dim=0`), or a mask; any dtype. If it is sharded, all processes
            must call this.
    """
    if weight.shape[dim] % m:
        return False
    groups = weight.movedim(dim, -1).unflatten(-1, (-1, m))
    return bool(whole(((groups != 0).sum(-1) <= n).all()))  # a DTensor alone would answer for its own piece


@dataclass(frozen=True)
class Pattern:
    """The masks a layer may have: `n` of every `m` along the input dimension, or `n/m` of the layer without groups.

    Attributes:
        structured: whether there are groups.
    """

    n: int
    m: int
    structured: bool = True

    @classmethod
    def of(cls, config: SparsityConfig) -> "Pattern":
        """The pattern of a configuration."""
        return cls(config.n, config.m, config.structured)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.structured else UNSTRUCTURED

    @property
    def sparsity(self) -> float:
        """Share of the weights that is pruned."""
        return 1 - self.n / self.m

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the highest scores; ties keep the lower column (or position).

        Args:
            scores: `[out, in]`, any real dtype, no NaN.
        """
        if self.structured:
            return nm_mask(scores, self.n, self.m)
        kept = scores.numel() * self.n // self.m
        order = scores.flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        mask[order[:kept]] = True
        return mask.view_as(scores)

    def holds(self, weight: Tensor, dim: int = -1) -> bool:
        """Whether the non-zeros of a weight fit the pattern; `dim` is its input dimension.

        If the weight is sharded, all processes must call this.
        """
        if self.structured:
            return check_nm(weight, self.n, self.m, dim)
        return int(whole((weight != 0).sum())) <= weight.numel() * self.n // self.m


def gradual_mask(scores: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """A mask on the way to the pattern: of the weights that it prunes, only those with the lowest scores.

    Args:
        scores: `[out, in]`, any float dtype, 0 or more; below 0 where a weight is already pruned and stays pruned.
            Weights that are already pruned must fit the pattern.
        sparsity: share of the weights to prune; at `pattern.sparsity` the result is the pattern's own mask.
    """
    mask = pattern.mask(scores)
    if sparsity >= pattern.sparsity:
        return mask
    # a number of this device, so that the CPU does not wait for it
    pruned = (scores < 0).sum().clamp(min=round(sparsity * scores.numel()))
    order = torch.where(mask, torch.inf, scores).flatten().argsort(stable=True)
    gradual = torch.empty_like(mask).flatten()
    gradual[order] = torch.arange(scores.numel(), device=scores.device) >= pruned
    return torch.where(pruned < (~mask).sum(), gradual.view_as(scores), mask)


def flip_rate(mask: Tensor, previous: Tensor) -> float:
    """Share of positions whose state changed: `||m(W_t) - m(W_{t-1})||_1 / D` (paper Sec. 6.7).

    With the start mask as `previous` it is the initial flip rate. Shapes and dtype (bool) must agree. If the masks are
    sharded, all processes must call this.
    """
    return float(whole((mask ^ previous).sum())) / mask.numel()


def mask_fingerprint(mask: Tensor) -> Tensor:
    """A 62-bit hash of a mask, on its device: `Σ xᵢⱼ aⱼ bᵢ mod 2⁶⁴`; words x have eight positions, a and b are odd.

    Args:
        mask: bool, any shape, maybe empty.

    Returns:
        int64 scalar, from −2⁶¹ to 2⁶¹.
    """
    flat = mask.flatten().view(torch.uint8)
    words = F.pad(flat, (0, -len(flat) % (8 * _ROW))).view(torch.int64).view(-1, _ROW)
    rows = (words * _factors(_ROW, mask.device)).sum(-1)
    return (rows * _factors(len(rows), mask.device)).sum() >> 2


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd int64 numbers that look random."""
    mixed = torch.arange(1, count + 1, device=device).mul_(_GOLDEN)
    return mixed.bitwise_xor_(mixed >> 29).mul_(_GOLDEN).bitwise_or_(1)
