"""What a pattern takes from a layer, as a share of all that the layer computes: the objective of a change of basis."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ast_sparse.basis.energies import Inputs
from ast_sparse.basis.structure import Structure, Unit, weight_of


def lost(weight: Tensor, inverse: Tensor, n: int, m: int) -> Tensor:
    """Importance that an N:M mask removes: `Σ_groups` of the `m - n` smallest `W_ij² / d_j`; a scalar.

    With `d = diag(H⁻¹)` this is the output error that SparseGPT gives a single pruned weight. Differentiable.

    Args:
        weight: `[rows, columns]`, columns a multiple of `m`.
        inverse: d, `[columns]`, or any shape that broadcasts to that of the weight.
    """
    return smallest(weight.square() / inverse, n, m).sum()


def smallest(importance: Tensor, n: int, m: int) -> Tensor:
    """Sum of the `m - n` smallest of each group of `m` along the last dimension, `[..., size / m]`."""
    groups = importance.unflatten(-1, (-1, m))
    if (n, m) == (2, 4):  # several times faster than a sort: the two lie in one half of the group, or one in each
        a, b, c, d = groups.unbind(-1)
        return torch.minimum(torch.minimum(a + b, c + d), torch.minimum(a, b) + torch.minimum(c, d))
    return groups.topk(m - n, dim=-1, largest=False).values.sum(-1)


def diagonal_in(inverse: Tensor, rotation: Tensor) -> Tensor:
    """`diag(Qᵀ H⁻¹ Q)`, `[..., size]`, for H⁻¹ and Q `[..., size, size]`."""
    return (rotation * (inverse @ rotation)).sum(-2)


def diagonals(unit: Unit, inputs: Inputs) -> dict[str, Tensor]:
    """By layer of a unit, the d of its columns in the present basis, `[columns]`."""
    reads, writes = inputs.inverse, inputs.writer_inverse
    reads = reads.diagonal() if reads.dim() == 2 else reads
    writes = writes.diagonal(dim1=-2, dim2=-1).flatten() if writes.dim() > 1 else writes
    return {**dict.fromkeys(unit.readers, reads), unit.writer_name: writes}


@torch.no_grad()
def turned_inputs(inputs: Inputs, stream: Tensor, heads: Tensor | None) -> Inputs:
    """The statistics, with Hessians, in a rotated basis; only the diagonals that importances need.

    Args:
        stream: Q, `[width, width]`.
        heads: R of the unit's values, `[kv heads, size, size]`; None: these are not rotated.
    """
    home, writes = inputs.inverse.device, inputs.writer_inverse
    if heads is not None:
        turning = heads[:, None].to(stream.device, torch.float32).expand(writes.shape)
        writes = diagonal_in(writes.to(turning), turning).flatten().to(home)
    stream = stream.float()
    return replace(inputs, inverse=diagonal_in(inputs.inverse.to(stream), stream).to(home), writer_inverse=writes)


@torch.no_grad()
def lost_share(structure: Structure, inputs: Sequence[Inputs], n: int, m: int) -> float:
    """Mean over the layers of `lost / tr(W H Wᵀ)`; layers whose width is no multiple of `m` are left out."""
    shares = []
    for unit, seen in zip(structure.units, inputs, strict=True):
        for name, diagonal in diagonals(unit, seen).items():
            weight = weight_of(unit.linears[name])
            if weight.shape[1] % m == 0 and seen.totals[name] > 0:
                total = sum(float(lost(rows.float(), diagonal, n, m)) for rows in weight.split(4096))
                shares.append(total / seen.totals[name])
    return sum(shares) / max(len(shares), 1)
