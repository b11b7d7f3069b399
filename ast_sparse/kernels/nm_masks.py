"""N:M masks of scores or of |W|: the N highest of every M are kept; ties keep the lower column."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ast_sparse.kernels.choice import Kernels, compile_kernel

_PAIRWISE_LIMIT = 8  # up to this M, comparing all pairs is faster than sorting
_COMPILED_LIMIT = 16  # and up to this M if the comparisons are compiled
_BLOCK = 1 << 18  # elements of an eager block on a CPU, so that temporaries stay in the cache


def nm_group_mask(scores: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """The eager mask, one block of rows at a time; on the meta device only its shape.

    Args:
        scores: `[rows, columns]`, any real dtype, no NaN; the size of `dim` is a multiple of `m`.

    Returns:
        Boolean mask of the shape of `scores`, contiguous.
    """
    dim %= 2
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if mask.is_meta:
        return mask
    size = scores.shape[0] or 1
    if scores.device.type == "cpu" and scores.numel():
        unit = m if dim == 0 else 1
        size = max(_BLOCK // scores.shape[1] // unit, 1) * unit
    for part, out in zip(scores.split(size), mask.split(size), strict=True):
        groups, target = part.unflatten(dim, (-1, m)), out.unflatten(dim, (-1, m))
        if m > _PAIRWISE_LIMIT:
            order = groups.argsort(dim=dim + 1, descending=True, stable=True).narrow(dim + 1, 0, n)
            target.zero_().scatter_(dim + 1, order, True)
        else:
            for column, kept in zip(target.unbind(dim + 1), _kept(groups.unbind(dim + 1), n), strict=True):
                column.copy_(kept)
    return mask


def magnitude_mask(weight: Tensor, n: int, m: int, dim: int, kernels: Kernels) -> Tensor:
    """The mask of |W|; both kernels return the same.

    Args:
        weight: `[out, in]` with `dim=1` or `[in, out]` with `dim=0`, any float dtype, no NaN; this process's piece.
    """
    if kernels == "eager" or m > _COMPILED_LIMIT or weight.numel() == 0:
        return nm_group_mask(weight.abs(), n, m, dim)
    groups = weight.detach().contiguous().view((-1, m) if dim == 1 else (-1, m, weight.shape[1]))
    mask: Tensor = _compiled_mask(n, m)(groups)
    return mask.view(weight.shape)


@cache
def _compiled_mask(n: int, m: int) -> Callable[..., Any]:
    # the inductor's vector code is 5 to 20 times slower on booleans than the loops that the C++ compiler vectorises
    return compile_kernel(_MagnitudeMask(n), **{"cpp.simdlen": 1})


class _MagnitudeMask(nn.Module):
    """A module, because torch.compile treats its integers as constants; those of a closure may become symbols."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, groups: Tensor) -> Tensor:
        return torch.stack(_kept(groups.abs().unbind(1), self.n), dim=1)


def _kept(columns: Sequence[Tensor], n: int) -> list[Tensor]:
    """For each column of the groups, whether it is kept, because it loses fewer than `n` comparisons."""
    if len(columns) == 4 and n == 2:
        a, b, c, d = columns
        ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
        return [_two_of(ab, ac, ad), _two_of(~ab, bc, bd), _two_of(~ac, ~bc, cd), _two_of(~ad, ~bd, ~cd)]
    losses = [torch.zeros_like(columns[0], dtype=torch.uint8) for _ in columns]
    for i in range(len(columns)):
        for j in range(i + 1, len(columns)):
            first_wins = columns[i] >= columns[j]
            losses[j] = losses[j] + first_wins
            losses[i] = losses[i] + ~first_wins
    return [lost < n for lost in losses]


def _two_of(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x & y) | ((x | y) & z)
