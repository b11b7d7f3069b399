"""Rewrite a dense causal LM in a basis in which N:M pruning loses less: it computes the same, with ordinary weights."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ast_sparse.basis.energies import measure_inputs
from ast_sparse.basis.objective import lost_share
from ast_sparse.basis.orders import find_orders, reorder
from ast_sparse.basis.structure import Structure, find_structure, sample_logits
from ast_sparse.config import BasisConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import Pattern

_CLOSE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class BasisReport:
    """What `change_basis` did.

    Attributes:
        pattern: the pattern that the basis is for.
        width: channels of the residual stream.
        permuted: what was reordered: `residual channels`, `MLP neurons`, `values in heads`.
        shares: share of the layers' importance in the positions that the pattern prunes, mean over the layers, by
            stage: `before`, `permuted`.
        logit_error: largest difference of the logits of a sample, as a share of the largest logit.
        seconds: for everything.
    """

    pattern: Pattern
    width: int
    permuted: tuple[str, ...]
    shares: dict[str, float]
    logit_error: float
    seconds: float

    def lines(self) -> list[str]:
        """A short text: what was done, what it gained, and the proof that the model computes the same."""
        shares = " -> ".join(f"{share:.4f} ({stage})" for stage, share in self.shares.items())
        return [
            f"basis for {self.pattern}, {self.width} residual channels, {self.seconds:.0f} s",
            f"  reordered  {', '.join(self.permuted) or 'nothing'}",
            f"  share of the importance in pruned positions: {shares}",
            f"  logits of a sample differ by {self.logit_error:.1e} of the largest",
        ]


@torch.no_grad()
def change_basis(
    model: nn.Module,
    config: BasisConfig,
    pattern: Pattern,
    samples: Tensor,
    *,
    seed: int = 0,
    damping: float = 0.01,
    device: torch.device | None = None,
    progress: bool = False,
) -> BasisReport:
    """Reorder the channels of a dense model for an N:M pattern, in place, before it is pruned.

    The model stays an ordinary one of its architecture. Its logits on a sample are compared; if they differ, the
    orders are undone exactly.

    Args:
        model: dense, in float32 or wider.
        config: what is changed.
        pattern: of the masks that follow.
        samples: `[sequences, tokens]` int64, calibration text.
        seed: unused without a rotation.
        damping: share of the Hessian's mean diagonal that is added to the diagonal.
        device: where the blocks run, one by one; default: where the model is.
        progress: show bars.

    Raises:
        UserError: the pattern has no groups, the model is not understood or not in float32, or its logits change.
    """
    if config.rotation_steps:
        raise UserError("basis.rotation_steps is not ready yet. Set 0.", "basis.rotation_steps")
    start = time.perf_counter()
    _check(model, pattern)
    structure = find_structure(model, samples)
    before = sample_logits(model, samples)
    inputs = list(measure_inputs(model, structure, samples, False, damping, device, progress))
    shares = {"before": lost_share(structure, inputs, pattern.n, pattern.m)}
    permuted: tuple[str, ...] = ()
    error = 0.0
    if config.permute:
        orders = find_orders(structure, inputs, pattern.n, pattern.m)
        reorder(structure, orders)
        inputs = [each.permuted(orders.channels, c) for each, c in zip(inputs, orders.columns, strict=True)]
        shares["permuted"] = lost_share(structure, inputs, pattern.n, pattern.m)
        permuted = _reordered(structure, pattern.m)
        error = _difference(before, sample_logits(model, samples))
        if error > _CLOSE:
            reorder(structure, orders.inverse())
            raise _changed(model, error, "It is as it was.")
    return BasisReport(pattern, structure.width, permuted, shares, error, time.perf_counter() - start)


def _check(model: nn.Module, pattern: Pattern) -> None:
    if not pattern.structured:
        raise UserError(
            f"sparsity.pattern={str(pattern)!r} has no groups to arrange channels in. Set N:M, or leave out the change "
            "of basis.",
            "sparsity.pattern",
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"`{name}` is in {str(parameter.dtype).removeprefix('torch.')}: a change of basis needs float32 to "
                "compute the same. Load the model with dtype=torch.float32."
            )


def _difference(before: Tensor, after: Tensor) -> float:
    """Largest difference as a share of the largest logit; infinite if one is not finite."""
    error = float((after - before).abs().max() / before.abs().max())
    return error if error == error else float("inf")


def _changed(model: nn.Module, error: float, state: str) -> UserError:
    return UserError(
        f"{type(model).__name__} computes something else in the new basis: its logits differ by {error:.1e} of the "
        f"largest, more than {_CLOSE:.0e}. {state} Prune this model without a change of basis."
    )


def _reordered(structure: Structure, m: int) -> tuple[str, ...]:
    """What `reorder` reached, by kind."""
    units = [unit for unit in structure.units if unit.sources]
    kinds = {
        "residual channels": structure.width % m == 0,
        "MLP neurons": any(unit.heads is None for unit in units),
        "values in heads": any(unit.heads is not None and unit.heads[2] % m == 0 for unit in units),
    }
    return tuple(kind for kind, is_done in kinds.items() if is_done)
