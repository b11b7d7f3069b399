"""What is known of the inputs of each unit: their energies, or what SparseGPT's Hessian says about them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ast_sparse.basis.structure import Structure, Unit, refusal, weight_of
from ast_sparse.errors import UserError
from ast_sparse.progress import progress_bar
from ast_sparse.sparsity.select import decoder_blocks
from ast_sparse.sparsity.statistics import InputStatistics, calibrate_blocks


@dataclass(frozen=True)
class Inputs:
    """Statistics of the inputs of a unit's readers and of its writer, float32, where the model is.

    The importance of a weight is `W_ij² / d_j`. Without a Hessian `1/d_j` is the energy `H_jj` of the input (Wanda).
    With one, d is the diagonal of the damped `H⁻¹` (SparseGPT), and what is needed of `H⁻¹` in another basis is kept.

    Attributes:
        energy: `[in]`, diagonal of H of the readers.
        writer_energy: `[columns]`, the same of the writer.
        inverse: `[in, in]`, H⁻¹ of the readers, or `[in]` without a Hessian.
        writer_inverse: of the writer; in attention with a Hessian the blocks of the query heads on its diagonal,
            `[kv heads, queries, size, size]`, otherwise `[columns]`.
        totals: by layer, `tr(W H Wᵀ)`, or the sum of the importances without a Hessian.
    """

    energy: Tensor
    writer_energy: Tensor
    inverse: Tensor
    writer_inverse: Tensor
    totals: dict[str, float]

    def permuted(self, channels: Tensor, columns: Tensor) -> "Inputs":
        """The statistics after the stream's channels and the writer's columns have been reordered (inside heads)."""
        inverse = self.inverse[channels]
        inverse = inverse[:, channels] if inverse.dim() == 2 else inverse
        writer = self.writer_inverse
        if writer.dim() == 1:
            writer = writer[columns]
        else:
            kv, queries, size, _ = writer.shape
            order = (columns % size).view(kv, queries, size).to(writer.device)  # `gather` takes no other device
            writer = writer.gather(2, order[..., None].expand_as(writer))
            writer = writer.gather(3, order[:, :, None].expand_as(writer))
        return replace(
            self,
            energy=self.energy[channels],
            writer_energy=self.writer_energy[columns],
            inverse=inverse,
            writer_inverse=writer,
        )


@torch.no_grad()
def measure_inputs(
    model: nn.Module,
    structure: Structure,
    samples: Tensor,
    with_hessian: bool,
    damping: float,
    device: torch.device | None,
    progress: bool,
) -> Iterator[Inputs]:
    """Run the dense blocks one after the other on `device`; yields the inputs of each unit in order.

    Args:
        damping: share of the Hessian's mean diagonal that is added to the diagonal before it is inverted.

    Raises:
        UserError: a layer got no input, or the blocks cannot be run one by one.
    """
    layers = {name: layer for unit in structure.units for name, layer in unit.linears.items()}
    home = next(model.parameters()).device  # a block is on `device` while it runs
    runs = calibrate_blocks(model, decoder_blocks(model), layers, samples, with_hessian, device, changes=False)
    label = "Measuring inputs"
    with progress_bar(total=len(structure.blocks), desc=label, unit="block", disable=not progress) as bar:
        for units, found in zip(structure.blocks.values(), runs, strict=True):
            for unit in units:
                read, written = (_seen(model, found, name) for name in (next(iter(unit.readers)), unit.writer_name))
                yield _inputs(unit, read, written, damping, home)
            bar.update()


def _seen(model: nn.Module, found: dict[str, InputStatistics | None], name: str) -> InputStatistics:
    statistics = found[name]
    if statistics is None:
        raise refusal(model, f"no token of the calibration text reached `{name}`")
    return statistics


def _inputs(unit: Unit, read: InputStatistics, written: InputStatistics, damping: float, home: torch.device) -> Inputs:
    totals = {name: _total(layer, read) for name, layer in unit.readers.items()}
    totals[unit.writer_name] = _total(unit.writer, written)
    inverse, writer_inverse = (_inverse(each, damping) for each in (read, written))
    if writer_inverse.dim() == 2:
        writer_inverse = _head_blocks(writer_inverse, unit.heads)
    parts = [each.to(home) for each in (_energy(read), _energy(written), inverse, writer_inverse)]
    return Inputs(parts[0], parts[1], parts[2], parts[3], totals)


def _energy(statistics: InputStatistics) -> Tensor:
    hessian = statistics.hessian
    return (statistics.mean_squares if hessian is None else hessian.diagonal()).clone()


def _total(layer: Any, statistics: InputStatistics) -> float:
    weight, hessian = weight_of(layer).to(statistics.mean_squares.device).float(), statistics.hessian
    if hessian is None:
        return float((weight.square().sum(0).double() @ statistics.mean_squares.double()).item())
    return float(((weight @ hessian) * weight).sum(dtype=torch.float64).item())


def _inverse(statistics: InputStatistics, damping: float) -> Tensor:
    """`[in, in]` of the damped Hessian; `[in]` without one, where inputs that are always 0 count as tiny."""
    if statistics.hessian is None:
        energy = statistics.mean_squares
        return 1 / energy.clamp(min=1e-12 * float(energy.mean()) + torch.finfo(torch.float32).tiny)
    damped = statistics.hessian.clone()
    damped.diagonal().add_(damping * float(damped.diagonal().mean()) + torch.finfo(torch.float32).tiny)
    lower, fault = torch.linalg.cholesky_ex(damped)
    if fault:
        raise UserError(
            f"The Hessian of a layer's inputs with calibration.damping={damping} is not positive definite. Raise "
            "calibration.damping, for example to 0.05.",
            "calibration.damping",
        )
    return torch.cholesky_inverse(lower)


def _head_blocks(inverse: Tensor, heads: tuple[int, int, int] | None) -> Tensor:
    """What a rotation inside heads needs of the writer's H⁻¹; of an MLP only the diagonal."""
    if heads is None:
        return inverse.diagonal().clone()
    kv, queries, size = heads
    blocks = inverse.view(kv * queries, size, kv * queries, size).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).reshape(kv, queries, size, size).clone()
