"""Make the layers of a model sparse, one after the other, and remember finished blocks."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ast_sparse.config import CalibrationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.progress import progress_bar
from ast_sparse.schedules import sparsity_at
from ast_sparse.sparsity.layers import SparseLayer, group_dim_of, make_sparse, out_by_in, unpack_bits
from ast_sparse.sparsity.masks import Pattern, gradual_mask
from ast_sparse.sparsity.oneshot import METHODS, PrunedLayer, prune_layer, settle
from ast_sparse.sparsity.recovery import BlockRecovery
from ast_sparse.sparsity.select import Prunable, decoder_blocks
from ast_sparse.sparsity.slorb import SLoRB, init_without_text, slorb_init, slorb_svd
from ast_sparse.sparsity.statistics import BlockSteps, Call, InputStatistics, calibrate_blocks

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class FinishedBlock:
    """A pruned block.

    Attributes:
        tensors: by their names in the sparse model, on the CPU: weights with settled pruned ones, other parameters,
            packed masks (`start_mask`), and SLoRB.
        errors: of its layers, by name.
        recovered: the block's error before and after recovery; None without.
    """

    tensors: dict[str, Tensor]
    errors: dict[str, float]
    recovered: tuple[float, float] | None = None


class Pruning(BlockSteps):
    """Writes results of pruning into the layers of a model.

    Args:
        layers: the selected layers by name, each once.
        sparsity: pattern and method.
        slorb: adapters to make; None for none.
        bare: layers without SLoRB.
        recovery: trains each pruned block; None for none.
        finished: blocks of an earlier try; every pruned block is added.

    Attributes:
        adapters: SLoRB by layer name, to be attached when all blocks are pruned; `slorb.init=svd` is in the layer at
            once, so that recovery trains it and the next blocks are calibrated with it.
        needs_hessian: also if the method does not.
        errors: by layer name.
        recovered: by block name.
    """

    def __init__(
        self,
        layers: Mapping[str, Prunable],
        sparsity: SparsityConfig,
        slorb: SLoRBConfig | None = None,
        bare: Sequence[str] = (),
        recovery: BlockRecovery | None = None,
        finished: MutableMapping[str, FinishedBlock] | None = None,
    ) -> None:
        self.layers, self.sparsity, self.pattern = layers, sparsity, Pattern.of(sparsity)
        self.finished = finished
        self.adapters: dict[str, SLoRB] = {}
        self.errors: dict[str, float] = {}
        self.recovered: dict[str, tuple[float, float]] = {}
        self.needs_targets = recovery is not None
        self.needs_hessian = slorb is not None and slorb.init == "svd"
        self._slorb, self._bare, self._recovery = slorb, bare, recovery
        self._dense: dict[str, Tensor] = {}  # of the block that is being pruned, if it will be recovered

    def put(self, name: str, result: PrunedLayer, statistics: InputStatistics | None) -> None:
        """Make a layer sparse with the result of pruning it on inputs with these statistics."""
        layer = self.layers[name]
        dim = group_dim_of(layer)
        has_slorb = self._slorb is not None and name not in self._bare
        dense = out_by_in(layer.weight, dim).clone() if has_slorb else None
        weight, mask = result.weight, result.mask
        if not METHODS[self.sparsity.init].by_magnitude:
            weight = settle(weight, mask, self.pattern)
            layer.weight.copy_(out_by_in(weight, dim))
        if not weight.is_meta and not self.sparsity.is_gradual:
            self.errors[name] = result.error
        self._make_sparse(layer, out_by_in(mask, dim))
        if dense is None or self._slorb is None:
            return
        start = torch.where(mask, weight, 0)
        if self._slorb.init == "svd" and not weight.is_meta:
            hessian = None if statistics is None else statistics.hessian
            self._add_adapter(name, *slorb_svd(dense, start, self._slorb.k, hessian))
        elif self._recovery is not None:
            self._dense[name] = dense
        else:
            self._add_adapter(name, *self._by_groups(dense, start))

    def finish(
        self, name: str, block: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor], call: Call
    ) -> None:
        """Recover a block, and remember it."""
        if self._recovery is not None:
            self._recovery(name, block, inputs, targets, call)
            self.recovered.update(self._recovery.errors)
        for layer, dense in self._dense.items():
            sparse = self.layers[layer]
            assert isinstance(sparse, SparseLayer), "every layer of the block was put"
            start = out_by_in(sparse.masked_weight(), sparse.group_dim)
            self._add_adapter(layer, *self._by_groups(dense, start))
        self._dense = {}
        if self.finished is not None:
            self.finished[name] = self._state(name, block)

    def restore(self, name: str, block: nn.Module) -> bool:
        """Make a block what it was when it was finished."""
        state = None if self.finished is None else self.finished.get(name)
        if state is None:
            return False
        for layer in self._inside(name):
            module = self.layers[layer]
            dim = group_dim_of(module)
            bits = unpack_bits(state.tensors[f"{layer}.start_mask"].to(module.weight.device), dim)
            self._make_sparse(module, bits.narrow(dim, 0, module.weight.shape[dim]))
            if f"{layer}.slorb.S" in state.tensors:
                s, x = (state.tensors[f"{layer}.slorb.{key}"].to(module.weight.device) for key in ("S", "X"))
                self._add_adapter(layer, s, x)
        for key, parameter in block.named_parameters(remove_duplicate=False):
            if f"{name}.{key}" in state.tensors:
                parameter.copy_(state.tensors[f"{name}.{key}"])
        self.errors |= state.errors
        if state.recovered is not None:
            self.recovered[name] = state.recovered
        return True

    def _make_sparse(self, layer: Prunable, mask: Tensor) -> None:
        make_sparse(layer, mask, self.pattern, self.sparsity.fixed_masks, self.sparsity.forward == "dense")

    def _inside(self, block: str) -> list[str]:
        return [layer for layer in self.layers if layer.startswith(f"{block}.")]

    def _by_groups(self, dense: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        assert self._slorb is not None, "only layers with SLoRB keep their dense weight"
        return slorb_init(dense, start, self._slorb.k, init_without_text(self._slorb))

    def _add_adapter(self, name: str, s: Tensor, x: Tensor) -> None:
        assert self._slorb is not None, "a block that was finished before has the same settings"
        self.adapters[name] = adapter = SLoRB(s, x, self._slorb.train_projection)
        if self._slorb.init == "svd":
            layer = self.layers[name]
            assert isinstance(layer, SparseLayer), "it was put"
            layer.slorb = adapter

    def _state(self, name: str, block: nn.Module) -> FinishedBlock:
        """A copy of what a block is now."""
        inside = self._inside(name)
        found = {f"{name}.{key}": value for key, value in block.named_parameters() if not key.endswith(".mask")}
        for layer in inside:
            if (adapter := self.adapters.get(layer)) is not None:
                found |= {f"{layer}.slorb.S": adapter.S, f"{layer}.slorb.X": adapter.X}
        tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in found.items()}
        errors = {layer: self.errors[layer] for layer in inside if layer in self.errors}
        return FinishedBlock(tensors, errors, self.recovered.get(name))


def prune_layers(
    model: nn.Module,
    pruning: Pruning,
    calibration: CalibrationConfig,
    samples: Tensor | None,
    device: torch.device | None,
    progress: bool,
) -> Iterator[tuple[str, PrunedLayer, InputStatistics | None]]:
    """Prune one layer at a time by `sparsity.init`; yields what the caller puts into the model.

    A layer that no token reached (an expert) is pruned by magnitude. Arguments as in `sparsify_model`.
    """
    config, layers, pattern = pruning.sparsity, pruning.layers, pruning.pattern
    method, is_meta = METHODS[config.init], next(model.parameters()).is_meta
    groups: Iterable[Mapping[str, InputStatistics | None]] = [dict.fromkeys(layers)]
    if method.needs_text and not is_meta:
        if samples is None:
            needs = f"sparsity.init={config.init!r} needs text to calibrate on. Give calibration samples."
            raise UserError(needs, "sparsity.init")
        blocks = decoder_blocks(model)
        with_hessian = method.needs_hessian or pruning.needs_hessian
        groups = calibrate_blocks(model, blocks, layers, samples, with_hessian, device, pruning)
    label = f"Pruning, {config.init} {pattern}"
    done = sum(name.startswith(f"{block}.") for block in pruning.finished or () for name in layers)
    with progress_bar(total=len(layers), initial=done, desc=label, unit="layer", disable=not progress) as bar:
        for name, statistics in ((name, group[name]) for group in groups for name in group):
            layer = layers[name]
            weight = out_by_in(layer.weight, group_dim_of(layer))
            if statistics is None and method.needs_text and not is_meta:
                logger.warning(f"No token of the calibration text reached `{name}`: it is pruned by magnitude.")
            result = prune_layer(name, weight, config.init, pattern, statistics, calibration)
            if config.is_gradual and not is_meta:  # the first round, or everything is kept
                mask = gradual_mask(weight.abs(), pattern, sparsity_at(config, 0, config.rounds))
                result = replace(result, mask=mask)
            bar.set_postfix_str(f"{name} error {result.error:.4f}" if not is_meta else "", refresh=False)
            yield name, result, statistics
            bar.update()
