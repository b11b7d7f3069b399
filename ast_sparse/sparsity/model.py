"""Operations on all pruned layers of a model: sparsify, refresh, apply, densify."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ast_sparse.config import CalibrationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.config.sparsity import Method
from ast_sparse.distributed.pieces import (
    differs_between_copies,
    has_copies,
    local,
    piece_for,
    refuse_sharded,
    sum_over_pieces,
    unwrapped_name,
    whole,
)
from ast_sparse.errors import SharedError, UserError
from ast_sparse.kernels.bf16 import multiplies_in_bf16
from ast_sparse.kernels.choice import Kernels
from ast_sparse.sparsity.layers import SparseLayer, make_dense, out_by_in, share_mask
from ast_sparse.sparsity.masked_copy import MaskedCopy, MaskedWeights
from ast_sparse.sparsity.masks import Pattern, gradual_mask, mask_fingerprint
from ast_sparse.sparsity.oneshot import METHODS, prune_weight
from ast_sparse.sparsity.pruning import FinishedBlock, Pruning, prune_layers
from ast_sparse.sparsity.recovery import BlockRecovery, check_recovery
from ast_sparse.sparsity.select import (
    Prunable,
    check_shapes,
    decoder_blocks,
    refuse_adapter,
    select_layers,
    takes_slorb,
    twins,
)
from ast_sparse.sparsity.slorb import check_slorb, slorb_init
from ast_sparse.sparsity.statistics import InputStatistics
from ast_sparse.storage.finite import check_finite
from ast_sparse.storage.quantized import make_plain

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class SparsityReport:
    """What `sparsify_model` did.

    Attributes:
        pruned: shape of the weight by layer name.
        skipped: reason by name of the linear, embedding or fused expert weight that stays dense.
        pattern: the pattern of the masks.
        total_parameters: parameters of the dense model, tied ones once, without masks.
        without_slorb: the pruned layers without SLoRB in a run that has it, because PEFT could not load it there.
        errors: of one-shot pruning by layer name, as in `PrunedLayer`; empty on the meta device, and for IMP and GMP.
        recovered: by block, the relative error of its outputs before and after block-wise recovery.
    """

    pattern: Pattern
    pruned: dict[str, tuple[int, ...]]
    skipped: dict[str, str]
    total_parameters: int
    errors: dict[str, float] = field(default_factory=dict)
    without_slorb: tuple[str, ...] = ()
    recovered: dict[str, tuple[float, float]] = field(default_factory=dict)
    pruned_parameters: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pruned_parameters", sum(a * b for a, b in self.pruned.values()))

    def lines(self) -> list[str]:
        """A short text: the totals, the pruned layers by kind, and the skipped ones with the reason."""
        kinds = _by_kind(self.pruned)
        share = self.pruned_parameters / self.total_parameters
        lines = [
            f"{self.pattern} on {len(self.pruned)} layers: {self.pruned_parameters:,} of "
            f"{self.total_parameters:,} parameters ({share:.1%})"
        ]
        lines += [f"  pruned   {kind}  {count} x {list(shape)}" for (kind, shape), count in kinds.items()]
        for (kind, _), count in _by_kind(dict.fromkeys(self.without_slorb, ())).items():
            lines.append(f"  no SLoRB {kind}  ({count}): PEFT does not load an adapter for it")
        reasons = _by_kind({name: (reason,) for name, reason in self.skipped.items()})
        lines += [f"  skipped  {kind}  ({count}): {reason[0]}" for (kind, reason), count in reasons.items()]
        return lines


def _by_kind(rows: dict[str, tuple[Any, ...]]) -> dict[tuple[str, tuple[Any, ...]], int]:
    """Count rows whose names differ only in the number of their block: `model.layers.*.mlp.up_proj`."""
    kinds: dict[tuple[str, tuple[Any, ...]], int] = {}
    for name, value in rows.items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kinds[kind, value] = kinds.get((kind, value), 0) + 1
    return kinds


@torch.no_grad()
def sparsify_model(
    model: nn.Module,
    sparsity_config: SparsityConfig,
    slorb_config: SLoRBConfig | None = None,
    *,
    calibration_config: CalibrationConfig | None = None,
    samples: Tensor | None = None,
    device: torch.device | None = None,
    progress: bool = False,
    finished: MutableMapping[str, FinishedBlock] | None = None,
) -> SparsityReport:
    """Give every selected layer its start mask by `sparsity.init`, and SLoRB if it is enabled, in place.

    Magnitude does not change the weights. With other methods pruned weights shrink below the smallest kept one of their
    group, so that the mask survives the first refreshes, and SparseGPT changes the kept ones. With
    `calibration.recovery_epochs` each block is trained a little before the next one is pruned. On the meta device
    nothing is computed.

    Args:
        calibration_config: SparseGPT's damping and block size, and the settings of recovery.
        samples: `[sequences, tokens]` int64, for a method that needs text.
        device: where the samples run, block by block; default: where the model is.
        progress: show a bar with the layers and their errors.
        finished: blocks by name that an earlier try with the same model, settings and text has pruned: they are taken
            over. Every block that is pruned now is added. Only for methods that need text.

    Raises:
        UserError: a shape does not fit, no layer is left, the model is already sparse or sharded or has a PEFT adapter,
            or samples are missing.
    """
    refuse_adapter(model)
    refuse_sharded(model, "Prune it before it is sharded, as SparseTrainer does.")
    make_plain(model, str(getattr(getattr(model, "config", None), "name_or_path", "")))
    calibration_config = calibration_config or CalibrationConfig()
    check_recovery(sparsity_config.init, calibration_config)
    if not next(model.parameters()).is_meta:
        check_slorb(sparsity_config.init, slorb_config)
    if sparse_layers(model):
        raise UserError("The model is already sparse. Load the dense model again, or call `densify_model` first.")
    selected, skipped = select_layers(model, sparsity_config)
    check_shapes(selected, sparsity_config, slorb_config)
    check_finite(model)
    total = sum(p.numel() for p in model.parameters())
    _check_forwards(selected)
    shapes = {name: tuple(layer.weight.shape) for name, layer in selected.items()}
    same = twins(model, selected)
    pattern = Pattern.of(sparsity_config)
    slorb = slorb_config if slorb_config is not None and slorb_config.enabled else None
    bare = tuple(name for name in selected if slorb is not None and not takes_slorb(model, name))
    recovery, home = None, next(model.parameters()).device
    if calibration_config.recovery_epochs > 0 and home.type != "meta":
        has_bf16, _ = multiplies_in_bf16(device or home)
        recovery = BlockRecovery(decoder_blocks(model), calibration_config, has_bf16)
    layers = {name: layer for layer, name in {layer: name for name, layer in selected.items()}.items()}
    pruning = Pruning(layers, sparsity_config, slorb, bare, recovery, finished)
    for name, result, seen in prune_layers(model, pruning, calibration_config, samples, device, progress):
        pruning.put(name, result, seen)
    for name, adapter in pruning.adapters.items():  # last, because only svd's is there while later blocks calibrate
        layer = cast(SparseLayer, model.get_submodule(name))
        layer.slorb = adapter.to(layer.weight.device)  # it was made where its block ran
    for name, others in same.items():
        for twin in others.values():
            share_mask(twin, cast(SparseLayer, model.get_submodule(name)))
    return SparsityReport(pattern, shapes, skipped, total, pruning.errors, bare, pruning.recovered)


def _check_forwards(selected: Mapping[str, Prunable]) -> None:
    for name, layer in selected.items():
        if "forward" in vars(layer):  # set by accelerate's hooks; it would bypass the mask
            raise UserError(
                f"`{name}` has its own forward, as in a model loaded with device_map. Load it without device_map."
            )


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of a model by name; those that share one weight appear once, under the first name."""
    first: dict[Tensor, tuple[str, SparseLayer]] = {}
    for name, layer in _all_sparse_layers(model).items():
        first.setdefault(layer.weight, (name, layer))
    return dict(first.values())


def _all_sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLayer)}
    return {unwrapped_name(name): layer for name, layer in layers.items()}


@torch.no_grad()
def refresh_masks(
    model: nn.Module,
    criterion: Method = "magnitude",
    statistics: Mapping[str, InputStatistics] | None = None,
    *,
    sparsity: float | None = None,
    calibration_config: CalibrationConfig | None = None,
    step: int | None = None,
) -> dict[str, tuple[float, float]]:
    """Recompute every mask from |W| (paper Sec. 3.2), or by another criterion (Table 13); weights stay as they are.

    Args:
        statistics: for a method that needs text, by layer name, those of the current inputs.
        sparsity: share of pruned weights on the way to the pattern (IMP, GMP): pruned weights stay pruned.
        calibration_config: SparseGPT's damping and block size.
        step: of a run, whose processes compare their new masks; all must call this.

    Returns:
        By layer name, the flip rate against the previous mask and the initial flip rate against the start mask.

    Raises:
        SharedError: processes that should have the same mask do not; on all of them.
    """
    layers = sparse_layers(model)
    flips = []
    for name, layer in layers.items():
        if METHODS[criterion].by_magnitude and sparsity is None and layer.pattern.structured:
            new = layer.magnitude_mask()
        else:  # from the whole layer, which every process of a sharded run has at this moment
            new = piece_for(_layer_mask(name, layer, criterion, statistics, sparsity, calibration_config), layer.mask)
        mask = local(layer.mask)
        flips.append(torch.stack([(new ^ before).count_nonzero() for before in (mask, layer.unpacked_start_mask())]))
        mask.copy_(new)  # in place: the optimizer and torch.compile refer to this tensor
    if not flips:
        return {}
    masks = {name: layer.mask for name, layer in layers.items()}
    counts = _sums(torch.stack(flips), list(masks.values()), step is not None)
    for name, (*_, unequal) in zip(masks, counts, strict=True):
        if unequal:
            raise SharedError(
                f"Step {step}: the mask of `{name}` is not the same on all processes, whose weights must be equal. "
                "Resume from the last checkpoint. If this happens again, test the memory and the devices of the nodes, "
                "and install the same versions on all of them."
            )
    rates = zip(masks.items(), counts, strict=True)
    return {name: (now / mask.numel(), initial / mask.numel()) for (name, mask), (now, initial, _) in rates}


def _sums(flips: Tensor, masks: list[nn.Parameter], compared: bool) -> list[list[int]]:
    """Flips summed over the pieces, and whether the masks of processes that should have equal ones differ.

    Both come to the CPU at once, so that the comparison does not wait for the device.

    Args:
        flips: int64 `[layers, 2]`.
        masks: of the layers.
        compared: False: no mask differs.
    """
    differ = flips.new_zeros(len(masks))
    if compared and has_copies(masks[0]):
        prints = torch.stack([mask_fingerprint(local(mask)) for mask in masks])
        differ = differs_between_copies(prints, masks[0]).to(flips)
    counts: list[list[int]] = sum_over_pieces(torch.cat([flips, differ[:, None]], 1), masks[0]).tolist()
    return counts


@torch.no_grad()
def count_kept(model: nn.Module) -> int:
    """The number of weights that the masks keep, in all layers and pieces; all processes must call this."""
    masks = [layer.mask for layer in sparse_layers(model).values()]
    counts = torch.stack([local(mask).count_nonzero() for mask in masks])
    return int(sum_over_pieces(counts.sum(), masks[0]))  # read back once


def _layer_mask(
    name: str,
    layer: SparseLayer,
    criterion: Method,
    statistics: Mapping[str, InputStatistics] | None,
    sparsity: float | None,
    calibration: CalibrationConfig | None,
) -> Tensor:
    """The new mask of a whole layer, if a piece of it is not enough to compute one; in the layer's own layout."""
    weight, mask = (out_by_in(whole(tensor), layer.group_dim) for tensor in (layer.weight, layer.mask))
    if sparsity is not None:
        new = gradual_mask(torch.where(mask, weight.abs(), -1), layer.pattern, sparsity)
    else:
        seen = (statistics or {}).get(name)
        if METHODS[criterion].needs_text and seen is None:
            logger.warning_once(f"`{name}` got no input: its mask is refreshed by magnitude.")
        seen = None if seen is None else seen.to(weight.device)  # offloaded weights are in host memory
        _, new = prune_weight(name, weight, criterion, layer.pattern, seen, calibration)
    return out_by_in(new, layer.group_dim)


@torch.no_grad()
def restart_slorb(model: nn.Module, init: Literal["mean", "zero"]) -> None:
    """Set S of every layer by (6) from the weights that its mask prunes now, in place; X does not change.

    The decay has shrunk these weights, so S is smaller than at the start of a run.
    """
    for layer in sparse_layers(model).values():
        if layer.slorb is not None:
            weight, mask = (out_by_in(local(tensor), layer.group_dim) for tensor in (layer.weight, layer.mask))
            start, _ = slorb_init(weight, torch.where(mask, weight, 0), layer.slorb.k, init)
            local(layer.slorb.S).copy_(start)


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """Set every pruned weight to exactly 0.0, in place; the layers stay sparse layers."""
    for layer in sparse_layers(model).values():
        weight, mask = local(layer.weight), local(layer.mask)
        weight.copy_(torch.where(mask, weight, 0))


def densify_model(model: nn.Module) -> None:
    """Turn every sparse layer back into a plain `nn.Linear` or `Conv1D` with the masked weight; SLoRB is dropped."""
    for layer in _all_sparse_layers(model).values():
        make_dense(layer)


@contextmanager
def slorb_set_aside(model: nn.Module) -> Iterator[bool]:
    """Inside, the sparse layers compute without their SLoRB; yields whether any layer has one."""
    pairs = {layer: layer.slorb for layer in _all_sparse_layers(model).values() if layer.slorb is not None}
    for layer in pairs:
        layer.slorb = None
    try:
        yield bool(pairs)
    finally:
        for layer, slorb in pairs.items():
            layer.slorb = slorb


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Set which kernels the sparse layers of a model use."""
    for layer in _all_sparse_layers(model).values():
        layer.kernels = kernels


def use_masked_weights(model: nn.Module, choice: MaskedWeights, semi_structured: bool = False) -> None:
    """Set whether the sparse layers of a model keep `m ⊙ W` in 16 bits while they are trained under autocast.

    `kept` takes 2 bytes a weight, from the first forward pass in training mode until the model is evaluated, or
    `made` is set. Results are equal to the bit. `masked_copy.py` says when a copy is written again.

    Args:
        semi_structured: forward products are PyTorch's semi-structured ones, by a compressed form of each copy, where
            the pattern is 2:4, on a GPU with cuSPARSELt and for shapes that it takes. Results agree within rounding.
            Only with masks that fit their pattern all the time, so not with IMP and GMP.
    """
    layers = _all_sparse_layers(model).values()
    copies: dict[Tensor, MaskedCopy] = {}
    for layer in layers if choice == "kept" else ():
        copies[layer.weight] = MaskedCopy(semi_structured and layer.pattern == Pattern(2, 4))
    for layer in layers:
        layer.masked_copy = copies.get(layer.weight)


def masks_by_parameter(model: nn.Module) -> dict[Tensor, Tensor]:
    """Mask by weight parameter, as `SparseAdamW.bind_masks` takes it."""
    return {layer.weight: layer.mask for layer in sparse_layers(model).values()}
