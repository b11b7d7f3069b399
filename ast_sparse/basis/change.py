"""Rewrite a dense causal LM in a basis in which N:M pruning loses less: it computes the same, with ordinary weights."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ast_sparse.basis.energies import measure_inputs
from ast_sparse.basis.merge import fold_norms, restored_on_error, rotate
from ast_sparse.basis.objective import lost_share, turned_inputs
from ast_sparse.basis.orders import find_orders, reorder
from ast_sparse.basis.rotation import learn_rotation
from ast_sparse.basis.structure import Structure, check_rotation, find_structure, sample_logits
from ast_sparse.config import BasisConfig
from ast_sparse.distributed.pieces import refuse_sharded
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.statistics import check_tokens
from ast_sparse.storage.model_kind import check_outputs
from ast_sparse.storage.tied import untie_head

_CLOSE = 1e-4  # of the largest logit


@dataclass
class BasisReport:
    """What `change_basis` did.

    Attributes:
        pattern: the pattern that the basis is for.
        width: channels of the residual stream.
        permuted: what was reordered: `residual channels`, `MLP neurons`, `values in heads`.
        rotated: what was rotated: `residual stream`, `values in heads`.
        shares: share of what a layer computes that the pattern takes before weights are updated, mean over the layers,
            by stage: `before`, `permuted`, `rotated`. With a rotation by SparseGPT's importance and Hessian, and
            `before` when the gains of norms are folded already; otherwise by Wanda's.
        added_parameters: of the output head, if it was tied to the embedding and is not any more.
        logit_error: largest difference of the logits of a sample, as a share of the largest logit.
        seconds: for everything.
    """

    pattern: Pattern
    width: int
    permuted: tuple[str, ...] = ()
    rotated: tuple[str, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    added_parameters: int = 0
    logit_error: float = 0.0
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """A short text: what was done, what it gained and cost, and the proof that the model computes the same."""
        lines = [f"basis for {self.pattern}, {self.width} residual channels, {self.seconds:.0f} s"]
        lines += [f"  reordered  {', '.join(self.permuted)}"] if self.permuted else []
        lines += [f"  rotated    {', '.join(self.rotated)}"] if self.rotated else []
        if self.added_parameters:
            size = 2 * self.added_parameters / 1e6
            lines.append(f"  head       untied: {self.added_parameters:,} parameters more, {size:,.1f} MB in 16 bits")
        shares = " -> ".join(f"{share:.4f} ({stage})" for stage, share in self.shares.items())
        lines.append(f"  share that the pattern takes, mean over the layers: {shares}")
        return [*lines, f"  logits of a sample differ by {self.logit_error:.1e} of the largest"]


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
    """Reorder and rotate the channels of a dense model for an N:M pattern, in place, before it is pruned.

    The model stays an ordinary one of its architecture. A rotation folds the gains of norms into the layers that read
    them, and unties the output head. The logits of a sample are compared; if they differ, or anything else fails, the
    model is as it was. For that a rotation keeps a copy of the weights in host memory.

    Args:
        model: dense, in float32 or wider.
        config: what is changed.
        pattern: of the masks that follow.
        samples: `[sequences, tokens]` int64, calibration text.
        seed: of the rows and columns that the steps of a rotation look at.
        damping: share of the Hessian's mean diagonal that is added to the diagonal.
        device: where the blocks run, one by one, and the rotation is learned; default: where the model is.
        progress: show bars.

    Raises:
        UserError: the pattern has no groups, the model is not understood, is sharded, cannot be rotated or is not in
            float32, a token has no embedding, or the logits change.
    """
    start = time.perf_counter()
    _check(model, pattern)
    check_tokens(model, samples)
    structure = find_structure(model, samples)
    report = BasisReport(pattern, structure.width)
    is_rotated = config.rotation_steps > 0
    if is_rotated:
        _check_rotation(model, structure, config, pattern)
    before = sample_logits(model, samples)
    with restored_on_error(model, structure) if is_rotated else nullcontext():
        if is_rotated:
            report.added_parameters = untie_head(model)
            fold_norms(structure)
        inputs = list(measure_inputs(model, structure, samples, is_rotated, damping, device, progress))
        report.shares["before"] = lost_share(structure, inputs, pattern.n, pattern.m)
        orders = find_orders(structure, inputs, pattern.n, pattern.m) if config.permute else None
        if orders is not None:
            reorder(structure, orders)
            inputs = [each.permuted(orders.channels, c) for each, c in zip(inputs, orders.columns, strict=True)]
            report.shares["permuted"] = lost_share(structure, inputs, pattern.n, pattern.m)
            report.permuted = _reordered(structure, pattern.m)
        if is_rotated:
            rotation = learn_rotation(structure, inputs, pattern, config, seed, device, progress)
            rotate(structure, rotation)
            inputs = [turned_inputs(each, rotation.stream, r) for each, r in zip(inputs, rotation.heads, strict=True)]
            report.shares["rotated"] = lost_share(structure, inputs, pattern.n, pattern.m)
            has_heads = any(heads is not None for heads in rotation.heads)
            report.rotated = ("residual stream", "values in heads") if has_heads else ("residual stream",)
        report.logit_error = _difference(before, sample_logits(model, samples))
        if report.logit_error > _CLOSE:
            if orders is not None and not is_rotated:
                reorder(structure, orders.inverse())
            raise _changed(model, report.logit_error)
    report.seconds = time.perf_counter() - start
    return report


def _check_rotation(model: nn.Module, structure: Structure, config: BasisConfig, pattern: Pattern) -> None:
    check_rotation(model, structure)
    if structure.is_tied and not config.untie:
        raise UserError(
            f"basis.untie=False: {type(model).__name__} has tied embeddings, and a rotation needs an output head of "
            f"its own ({structure.head.weight.numel():,} parameters more). Set basis.untie: true, or "
            "basis.rotation_steps: 0.",
            "basis.rotation_steps",
        )
    if structure.width % pattern.m:
        raise UserError(
            f"{type(model).__name__} cannot be rotated for {pattern}: its {structure.width} channels are not a "
            f"multiple of {pattern.m}. Set basis.rotation_steps: 0.",
            "basis.rotation_steps",
        )


def _check(model: nn.Module, pattern: Pattern) -> None:
    refuse_sharded(model, "Change its basis before it is sharded.")
    check_outputs(model)
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


def _changed(model: nn.Module, error: float) -> UserError:
    return UserError(
        f"{type(model).__name__} computes something else in the new basis: its logits differ by {error:.1e} of the "
        f"largest, more than {_CLOSE:.0e}. It is as it was. Prune this model without a change of basis."
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
