"""Learn the rotation of the residual stream, and of the values in each head, that lets a pattern take least.

Adam on the skew-symmetric part of the gradient, `A = (Qᵀ G - Gᵀ Q) / 2`, and the step `Q exp(-η U)`, which stays
orthogonal. The objective is the mean over the layers of `lost / tr(W H Wᵀ)` (`objective.py`), in each step of random
rows, columns and heads.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ast_sparse.basis.energies import Inputs
from ast_sparse.basis.merge import Rotation
from ast_sparse.basis.objective import diagonal_in, diagonals, lost
from ast_sparse.basis.structure import Structure, Unit, weight_of
from ast_sparse.config import BasisConfig
from ast_sparse.progress import progress_bar
from ast_sparse.sparsity.masks import Pattern

_WARMUP = 5  # steps
_BETAS = 0.9, 0.95
_HEADS_RATE = 2.0  # times the learning rate: a head sees fewer samples
_FEWEST_ROWS, _FEWEST_GROUPS = 32, 8


def learn_rotation(
    structure: Structure,
    inputs: Sequence[Inputs],
    pattern: Pattern,
    config: BasisConfig,
    seed: int = 0,
    device: torch.device | None = None,
    progress: bool = False,
) -> Rotation:
    """Learn a rotation from the identity; the weights are only read.

    Args:
        inputs: with Hessians, of the model with folded norms.
        device: where products are computed, one unit at a time; default: where the model is.

    Returns:
        Orthogonal to rounding in float64.
    """
    units = list(structure.units)
    device = device or structure.head.weight.device
    stream = _Turning(torch.eye(structure.width, device=device))
    heads = [_heads_of(unit, pattern, device) for unit in units]
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(total=config.rotation_steps, desc="Rotating", unit="step", disable=not progress) as bar:
        for step in range(config.rotation_steps):
            objective = 0.0
            for unit, seen, turning in zip(units, inputs, heads, strict=True):
                objective += _add_gradients(unit, seen, stream, turning, pattern, config.rotation_share, generator)
            rate = config.rotation_learning_rate * min(1, (step + 1) / _WARMUP)
            rate *= 0.5 * (1 + math.cos(math.pi * step / config.rotation_steps))
            for turning in (stream, *heads):
                if turning is not None:
                    turning.step(rate if turning is stream else _HEADS_RATE * rate)
            bar.set_postfix_str(f"share {objective / sum(len(unit.linears) for unit in units):.4f}", refresh=False)
            bar.update()
    turned = [None if turning is None else orthogonal(turning.matrix) for turning in heads]
    return Rotation(orthogonal(stream.matrix), turned)


class _Turning:
    """Orthogonal matrices `[..., size, size]` under Adam."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.gradient = torch.zeros_like(matrix)
        self.mean, self.square, self.steps = torch.zeros_like(matrix), torch.zeros_like(matrix), 0

    def step(self, rate: float) -> None:
        """One step of Adam in the tangent space, by the gradient so far, which is then forgotten."""
        self.steps += 1
        skew = self.matrix.mT @ self.gradient
        skew = (skew - skew.mT) / 2
        self.mean.lerp_(skew, 1 - _BETAS[0])
        self.square.lerp_(skew.square(), 1 - _BETAS[1])
        mean, square = (
            moment / (1 - beta**self.steps) for moment, beta in zip((self.mean, self.square), _BETAS, strict=True)
        )
        self.matrix = self.matrix @ torch.matrix_exp(-rate * mean / (square.sqrt() + 1e-12))
        self.gradient.zero_()


def _heads_of(unit: Unit, pattern: Pattern, device: torch.device) -> _Turning | None:
    if unit.heads is None or not unit.sources or unit.heads[2] % pattern.m:
        return None
    kv, _, size = unit.heads
    return _Turning(torch.eye(size, device=device).repeat(kv, 1, 1))


def _add_gradients(
    unit: Unit,
    inputs: Inputs,
    stream: _Turning,
    heads: _Turning | None,
    pattern: Pattern,
    share: float,
    generator: torch.Generator,
) -> float:
    with torch.enable_grad():
        leaves = [turning.matrix.clone().requires_grad_() for turning in (stream, heads) if turning is not None]
        objective = sampled_shares(unit, inputs, leaves[0], *leaves[1:], pattern=pattern, share=share, by=generator)
        gradients = torch.autograd.grad(objective, leaves, allow_unused=True)
    for turning, gradient in zip((stream, heads), gradients, strict=False):
        if turning is not None and gradient is not None:
            turning.gradient += gradient
    return float(objective.detach())


def sampled_shares(
    unit: Unit,
    inputs: Inputs,
    stream: Tensor,
    heads: Tensor | None = None,
    *,
    pattern: Pattern,
    share: float,
    by: torch.Generator,
) -> Tensor:
    """Sum over a unit's layers of `lost / tr(W H Wᵀ)` in a rotated basis, estimated from a part of each weight.

    Args:
        stream: Q, `[width, width]`.
        heads: R, `[kv heads, size, size]`.
        share: share of rows or groups of columns that are taken; of heads, one is taken unless it is 1.
        by: chooses rows, columns and heads.
    """
    total = stream.new_zeros(())
    diagonal = diagonal_in(inputs.inverse.to(stream), stream)
    sources = {id(layer): start for layer, start in unit.sources} if heads is not None else {}
    for name, layer in unit.readers.items():
        weight, of_layer = weight_of(layer), inputs.totals[name]
        start = sources.get(id(layer), len(weight))
        found = stream.new_zeros(())
        if start:
            rows, scale = _chosen(start, share, _FEWEST_ROWS, by)
            found = scale * lost(_at(weight, rows, stream) @ stream, diagonal, pattern.n, pattern.m)
        if heads is not None and start < len(weight):
            kv, size, _ = heads.shape
            chosen, scale = _chosen(kv, 0.0 if share < 1 else 1.0, 1, by)
            values = _at(weight[start:], _members(chosen, size), stream).view(len(chosen), size, -1)
            turned = heads[chosen.to(heads.device)].mT @ values @ stream
            found = found + scale * lost(turned, diagonal, pattern.n, pattern.m)
        total = total + found / max(of_layer, torch.finfo(torch.float32).tiny)
    written = _written(unit, inputs, stream, heads, pattern, share, by)
    return total + written / max(inputs.totals[unit.writer_name], torch.finfo(torch.float32).tiny)


def _written(
    unit: Unit,
    inputs: Inputs,
    stream: Tensor,
    heads: Tensor | None,
    pattern: Pattern,
    share: float,
    by: torch.Generator,
) -> Tensor:
    """`lost` of the writer, whose rows are rotated by the stream, and whose columns inside heads by R."""
    weight = weight_of(unit.writer).t()
    if heads is None:
        if len(weight) % pattern.m:
            return stream.new_zeros(())
        groups, scale = _chosen(len(weight) // pattern.m, share, _FEWEST_GROUPS, by)
        columns = _members(groups, pattern.m)
        diagonal = diagonals(unit, inputs)[unit.writer_name][columns.to(inputs.writer_inverse.device)].to(stream)
        return scale * lost((_at(weight, columns, stream) @ stream).t(), diagonal, pattern.n, pattern.m)
    kv, size, _ = heads.shape
    queries = len(weight) // (kv * size)
    chosen, scale = _chosen(kv, 0.0 if share < 1 else 1.0, 1, by)
    turning = heads[chosen.to(heads.device)][:, None]
    columns = _at(weight, _members(chosen, queries * size), stream) @ stream
    turned = columns.view(len(chosen), queries, size, -1).mT @ turning
    blocks = inputs.writer_inverse[chosen.to(inputs.writer_inverse.device)].to(stream)
    diagonal = diagonal_in(blocks, turning.expand_as(blocks))
    return scale * lost(turned, diagonal[:, :, None], pattern.n, pattern.m)


def _chosen(count: int, share: float, fewest: int, by: torch.Generator) -> tuple[Tensor, float]:
    """A random part of `count` places, and what its sum must be multiplied by."""
    taken = min(count, max(fewest, int(count * share)))
    return torch.randperm(count, generator=by)[:taken], count / taken


def _members(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _at(weight: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    return weight[rows.to(weight.device)].to(like)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix in float64, for one that is almost orthogonal (Newton-Schulz)."""
    found = matrix.double()
    eye = torch.eye(found.shape[-1], dtype=found.dtype, device=found.device)
    for _ in range(10):
        residual = eye - found.mT @ found
        if float(residual.abs().max()) < 1e-14 * found.shape[-1]:
            break
        found = found + found @ residual / 2
    return found
