"""Merge the gains of norms and rotations into the weights of a model, which then computes the same."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ast_sparse.basis.structure import Structure, weight_of
from ast_sparse.storage.tied import configs_of

_ROWS = 8192  # multiplied at a time: float64 copies of a whole embedding would be large


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrices, float64 on one device; a row vector x becomes x Q.

    Attributes:
        stream: `[width, width]`, of the residual stream.
        heads: for each unit, `[kv heads, size, size]` of the values, or None where they are not known.
    """

    stream: Tensor
    heads: list[Tensor | None]


@contextmanager
def restored_on_error(model: Any, structure: Structure) -> Iterator[None]:
    """Give the model its old weights, gains and tied embeddings back if the block ends with an exception.

    The weights are kept in host memory, once more than the model, until the block ends.
    """
    saved = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in model.parameters()]
    was_tied, configs = structure.is_tied, configs_of(model)
    flags = [config.tie_word_embeddings for config in configs]
    keys = dict(getattr(model, "all_tied_weights_keys", {}))
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)
        if was_tied:
            structure.head.weight = structure.embeddings[0].weight
            for config, flag in zip(configs, flags, strict=True):
                config.tie_word_embeddings = flag
            model.all_tied_weights_keys = keys
        raise


@torch.no_grad()
def fold_norms(structure: Structure) -> None:
    """Multiply the columns of what reads a norm by its gain, of which one number stays; the head must not be tied.

    This number `s = ‖W g‖ / ‖W‖`, over all readers of the norm, leaves them the Frobenius norm that they had: with a
    gain of 1 they would be many times smaller, and the learning rate of a training that follows too large.
    """
    readers: dict[int, list[Tensor]] = {id(structure.outer_norms[-1]): [structure.head.weight]}
    for unit in structure.units:  # attention and MLP may read one norm
        readers.setdefault(id(unit.norm), []).extend(weight_of(layer) for layer in unit.readers.values())
    for norm in structure.norms:
        weights, gain = readers[id(norm)], norm.weight.clone()
        before = _frobenius(weights)
        for weight in weights:
            weight.mul_(gain)
        scale = _frobenius(weights) / before if before > 0 else 0.0
        scale = scale if scale > 0 else 1.0
        for weight in weights:
            weight.div_(scale)
        norm.weight.fill_(scale)


def _frobenius(weights: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(weight.norm(dtype=torch.float64)) ** 2 for weight in weights))


@torch.no_grad()
def rotate(structure: Structure, rotation: Rotation) -> None:
    """Merge a rotation into all weights, in place; with products in float64, after `fold_norms`."""
    stream = rotation.stream
    for module in (*structure.embeddings, structure.head):
        _by_rows(module.weight.data, torch.matmul, stream)
    for unit, heads in zip(structure.units, rotation.heads, strict=True):
        for layer in unit.readers.values():
            _by_rows(weight_of(layer), torch.matmul, stream)
        _by_rows(weight_of(unit.writer).t(), torch.matmul, stream)
        bias: Any = getattr(unit.writer, "bias", None)
        if bias is not None:
            _by_rows(bias.data[None], torch.matmul, stream)
        if heads is None or unit.heads is None:
            continue
        kv, queries, size = unit.heads
        for layer, start in unit.sources:
            values = slice(start, start + kv * size)
            _by_rows(weight_of(layer)[values].t(), _in_heads, heads, 1)
            bias = getattr(layer, "bias", None)
            if bias is not None:
                _by_rows(bias.data[None, values], _in_heads, heads, 1)
        _by_rows(weight_of(unit.writer), _in_heads, heads, queries)


def _in_heads(rows: Tensor, heads: Tensor, queries: int) -> Tensor:
    """Rotate each head of `rows` `[n, kv heads * queries * size]`; queries with one key-value head share R."""
    kv, size, _ = heads.shape
    turned = torch.einsum("nkgi,kij->nkgj", rows.view(len(rows), kv, queries, size), heads)
    return turned.reshape(rows.shape)


def _by_rows(tensor: Tensor, change: Callable[..., Tensor], matrix: Tensor, *given: Any) -> None:
    """Change rows in place, where the matrix is: the model may be in host memory."""
    for rows in tensor.split(_ROWS):
        rows.copy_(change(rows.to(matrix.device, torch.float64).contiguous(), matrix, *given))
