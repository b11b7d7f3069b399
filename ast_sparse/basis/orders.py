"""Orders of channels in which each group of M has N strong inputs and M-N weak ones, and how a model takes them.

A group of four strong inputs must lose two of them. If channels are sorted by what they carry and dealt out to groups,
no group has to. Nothing changes at run time: the order is in the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ast_sparse.basis.energies import Inputs
from ast_sparse.basis.structure import Structure, Unit, weight_of


@dataclass(frozen=True)
class Orders:
    """New orders, int64 on the CPU: the channel at place i was at place `order[i]`.

    Attributes:
        channels: `[width]`, of the residual stream.
        columns: for each unit, `[columns]` of its writer: neurons of an MLP, values inside each head.
    """

    channels: Tensor
    columns: list[Tensor]

    def inverse(self) -> "Orders":
        """The orders that undo these."""
        return Orders(self.channels.argsort(), [each.argsort() for each in self.columns])


def deal(scores: Tensor, n: int, m: int) -> Tensor:
    """Order the last dimension so that each group of `m` has `n` strong entries, then `m - n` weak ones.

    The strongest `n/m` of all entries go to the groups in falling order, the others in rising order: the group with the
    strongest entries gets the weakest. Ties keep the lower index. Unchanged if the size is no multiple of `m`.

    Args:
        scores: `[..., size]`.

    Returns:
        int64, the same shape.
    """
    size = scores.shape[-1]
    if size % m:
        return torch.arange(size).expand(scores.shape).clone()
    order = scores.cpu().argsort(dim=-1, descending=True, stable=True)
    strong = order[..., : size // m * n].unflatten(-1, (-1, n))
    weak = order[..., size // m * n :].flip(-1).unflatten(-1, (-1, m - n))
    return torch.cat([strong, weak], -1).flatten(-2)


def find_orders(structure: Structure, inputs: Sequence[Inputs], n: int, m: int) -> Orders:
    """Orders by the energy of an input times the norm of its column, `H_jj Σ_i W_ij²`.

    In the stream it is summed over the layers that read it, each normalised to 1; values that several query heads share
    are summed over these.
    """
    channels = torch.zeros(structure.width, dtype=torch.float64)
    columns = []
    for unit, seen in zip(structure.units, inputs, strict=True):
        for layer in unit.readers.values():
            energy = _scores(layer, seen.energy)
            channels += energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)
        columns.append(_column_order(unit, _scores(unit.writer, seen.writer_energy), n, m))
    return Orders(deal(channels, n, m), columns)


def _scores(layer: torch.nn.Module, energy: Tensor) -> Tensor:
    squares = weight_of(layer).float().square().sum(0, dtype=torch.float64)
    return (squares * energy.to(squares)).cpu()


def _column_order(unit: Unit, scores: Tensor, n: int, m: int) -> Tensor:
    if not unit.sources:
        return torch.arange(len(scores))
    if unit.heads is None:
        return deal(scores, n, m)
    kv, queries, size = unit.heads
    inside = deal(scores.view(kv, queries, size).sum(1), n, m)[:, None].expand(kv, queries, size)
    starts = torch.arange(kv * queries).view(kv, queries, 1) * size
    return (inside + starts).flatten()


@torch.no_grad()
def reorder(structure: Structure, orders: Orders) -> None:
    """Give all weights, gains and biases of a model the new orders, in place and exactly; tied weights stay tied."""
    channels = orders.channels
    for embedding in structure.embeddings:
        _take(embedding.weight.data, channels, 1)
    if not structure.is_tied:
        _take(structure.head.weight.data, channels, 1)
    for norm in structure.norms:
        for parameter in norm.parameters(recurse=False):
            _take(parameter.data, channels, 0)
    for unit, columns in zip(structure.units, orders.columns, strict=True):
        for layer in unit.readers.values():
            _take(weight_of(layer), channels, 1)
        _take(weight_of(unit.writer), channels, 0)
        _take(weight_of(unit.writer), columns, 1)
        _take_bias(unit.writer, channels, 0)
        rows = _source_rows(unit, columns)
        for layer, start in unit.sources:
            _take(weight_of(layer)[start : start + len(rows)], rows, 0)
            _take_bias(layer, rows, start)


def _source_rows(unit: Unit, columns: Tensor) -> Tensor:
    """The order of the rows that make the writer's columns: one query head of each group says it for the values."""
    if unit.heads is None:
        return columns
    kv, queries, size = unit.heads
    inside = columns.view(kv, queries, size)[:, 0] % size
    return (inside + torch.arange(kv)[:, None] * size).flatten()


def _take(tensor: Tensor, order: Tensor, dim: int) -> None:
    tensor.copy_(tensor.index_select(dim, order.to(tensor.device)))


def _take_bias(layer: torch.nn.Module, order: Tensor, start: int) -> None:
    bias = getattr(layer, "bias", None)
    if bias is not None:
        _take(bias.data[start : start + len(order)], order, 0)
