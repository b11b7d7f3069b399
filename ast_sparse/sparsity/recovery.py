"""Block-wise recovery: a few optimizer steps on each pruned block before the next one is pruned (EBFT, Wanda++).

A pruned block is trained alone, so that its outputs from the sparse model's inputs come close to the outputs that the
dense block has from the dense model's inputs. Masks stay as they are. Masks that are made anew between these steps
would belong into `BlockRecovery._train`, after `optimizer.step()`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.utils import logging

from ast_sparse.config import CalibrationConfig
from ast_sparse.config.sparsity import Method
from ast_sparse.errors import UserError
from ast_sparse.sparsity.layers import SparseLayer, out_by_in
from ast_sparse.sparsity.oneshot import METHODS, settle
from ast_sparse.sparsity.statistics import Call, run_block

logger = logging.get_logger(__name__)
_BETAS = (0.9, 0.95)  # few steps: a longer memory would not be filled
_WARM_UP = 0.1  # share of the steps in which the learning rate rises
_LAST = 0.1  # of the learning rate, at the end
_SMALLEST = 1e-12  # of what is divided by
_SAME = 1e-4  # largest difference, as a share of the largest output, that rounding makes
_MEASURED = 8  # sequences on which a block's error is measured, before and after


class BlockRecovery:
    """Trains a pruned block towards the outputs of the dense block.

    The weights of pruned layers are trained, SLoRB that they have, and vectors: norms and biases. Weights that several
    blocks share are not, nor is their SLoRB, because the blocks before were trained with them as they are.

    Args:
        blocks: all decoder blocks by name.
        settings: epochs, learning rate, sequences in a batch, and the seed of their order.
        bf16: compute the products of training in bfloat16 (autocast).

    Attributes:
        errors: by block, the relative error of its outputs before and after, see `block_loss`.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], settings: CalibrationConfig, bf16: bool = False) -> None:
        self.settings = settings
        self.bf16 = bf16
        self.errors: dict[str, tuple[float, float]] = {}
        uses = Counter(parameter for block in blocks.values() for parameter in block.parameters())
        self._shared = {parameter for parameter, count in uses.items() if count > 1}

    @torch.enable_grad()
    def __call__(
        self, name: str, block: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor], call: Call
    ) -> None:
        """Train one block in place, on its device; keep its weights if its error does not fall.

        Args:
            name: of the block.
            block: has sparse layers.
            inputs: of the sparse model, `[1, tokens, width]` for each sequence, on any device.
            targets: outputs of the dense block from the dense model's inputs, shaped as `inputs`.
            call: the other arguments of the block.

        Raises:
            UserError: the training diverged.
        """
        layers: dict[Tensor, SparseLayer] = {}
        layers.update((layer.weight, layer) for layer in block.modules() if isinstance(layer, SparseLayer))
        own = [layer.slorb for weight, layer in layers.items() if weight not in self._shared]
        added = {each for adapter in own if adapter is not None for each in adapter.parameters() if each.requires_grad}
        trained = [each for each in block.parameters() if each in added or self._is_trained(each, layers)]
        if not trained:
            return
        before = [each.detach().clone() for each in trained]
        with _only_trained(block, trained):
            errors = self._train(block, trained, layers, inputs, targets, call)
        if not all(bool(each.isfinite().all()) for each in trained) or not math.isfinite(errors[1]):
            _restore(trained, before)
            raise UserError(
                f"The recovery of `{name}` diverged. Lower calibration.recovery_learning_rate="
                f"{self.settings.recovery_learning_rate:g}, or set calibration.recovery_epochs to 0.",
                "calibration.recovery_learning_rate",
                "calibration.recovery_epochs",
            )
        self.errors[name] = errors
        if not errors[1] < errors[0]:
            _restore(trained, before)
            logger.warning(
                f"The recovery of `{name}` raised its error from {errors[0]:.4g} to {errors[1]:.4g}: its weights stay "
                "as they were. A lower calibration.recovery_learning_rate may help."
            )
            return
        for weight in trained:
            if weight in layers:  # kept weights may have become smaller than pruned ones
                _settle(layers[weight])

    def _is_trained(self, parameter: nn.Parameter, layers: Mapping[Tensor, SparseLayer]) -> bool:
        is_vector = parameter.dim() == 1 and parameter.is_floating_point()
        return parameter not in self._shared and (parameter in layers or is_vector)

    def _train(
        self,
        block: nn.Module,
        trained: list[nn.Parameter],
        layers: Mapping[Tensor, SparseLayer],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        call: Call,
    ) -> tuple[float, float]:
        """Train a block; returns its errors before and after."""
        settings, device = self.settings, trained[0].device
        order = torch.Generator().manual_seed(settings.seed)
        epochs = [torch.randperm(len(inputs), generator=order) for _ in range(settings.recovery_epochs)]
        batches = [batch.tolist() for epoch in epochs for batch in epoch.split(settings.recovery_batch_size)]
        optimizer = torch.optim.AdamW(trained, settings.recovery_learning_rate, _BETAS, weight_decay=0)
        before = self._error(block, inputs, targets, call)
        together = len(inputs) > 1 and runs_together(block, torch.cat([each.to(device) for each in inputs[:2]]), call)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = settings.recovery_learning_rate * rate_at(step, len(batches))
            for part in [batch] if together else [[index] for index in batch]:
                given, wanted = (torch.cat([each[i].to(device) for i in part]) for each in (inputs, targets))
                loss = self._loss(block, given, wanted, call) * len(part) / len(batch)
                (loss / max(before, _SMALLEST)).backward()
            for parameter in trained:
                if parameter in layers and parameter.grad is not None:
                    parameter.grad *= layers[parameter].mask
            optimizer.step()
            optimizer.zero_grad()
        return before, self._error(block, inputs, targets, call)

    @torch.no_grad()
    def _error(self, block: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor], call: Call) -> float:
        """The mean loss over the first sequences."""
        device, count = next(block.parameters()).device, min(len(inputs), _MEASURED)
        losses = [self._loss(block, inputs[i].to(device), targets[i].to(device), call) for i in range(count)]
        return float(torch.stack(losses).mean())

    def _loss(self, block: nn.Module, inputs: Tensor, targets: Tensor, call: Call) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = run_block(block, inputs.to(_wide(inputs.dtype)), tree_map(_widened, call))
        return block_loss(outputs, targets)


@contextmanager
def _only_trained(block: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, a block is at least float32, because 16 bits would lose small steps, and only some of it is trained."""
    was = {each: (each.dtype, each.requires_grad) for each in block.parameters() if each.is_floating_point()}
    for each in was:
        each.data = each.data.to(_wide(each.dtype))
        each.requires_grad_(False)
    for each in trained:
        each.requires_grad_(True)
    try:
        yield
    finally:
        for each, (dtype, needs_grad) in was.items():
            each.grad = None
            each.data = each.data.to(dtype)
            each.requires_grad_(needs_grad)


@torch.no_grad()
def _restore(trained: Sequence[nn.Parameter], before: Sequence[Tensor]) -> None:
    for each, was in zip(trained, before, strict=True):
        each.copy_(was)


@torch.no_grad()
def _settle(layer: SparseLayer) -> None:
    weight, mask = (out_by_in(tensor, layer.group_dim) for tensor in (layer.weight, layer.mask))
    layer.weight.copy_(out_by_in(settle(weight, mask, layer.pattern), layer.group_dim))


@torch.no_grad()
def runs_together(block: nn.Module, sequences: Tensor, call: Call) -> bool:
    """Whether a block gives several sequences at once, `[sequences, tokens, width]`, what it gives each alone.

    Its other arguments are those of one sequence, and in some architectures they do not fit several.
    """
    call, sequences = tree_map(_widened, call), sequences.to(_wide(sequences.dtype))
    alone = torch.cat([run_block(block, each[None], call) for each in sequences])
    try:
        together = run_block(block, sequences, call)
    except (RuntimeError, ValueError):  # shapes
        return False
    return together.shape == alone.shape and bool((together - alone).abs().max() <= _SAME * alone.abs().max())


def block_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Relative squared error of a block's outputs, `‖Y − Ŷ‖² / ‖Y‖²`, mean over the sequences; in float32 or wider.

    The few tokens with massive activations weigh most, and they must: attention rests on them. A loss relative to each
    token's own size loses them, and the model with them.

    Args:
        outputs, targets: `[sequences, tokens, width]`.
    """
    targets = targets.to(_wide(targets.dtype))
    error = (outputs.to(targets.dtype) - targets).square().mean((1, 2))
    return (error / targets.square().mean((1, 2)).clamp(min=_SMALLEST)).mean()


def rate_at(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a short linear rise, and a linear fall to a tenth."""
    return min(1.0, (step + 1) / max(1.0, _WARM_UP * steps)) * (1 - (1 - _LAST) * step / steps)


def check_recovery(init: Method, settings: CalibrationConfig) -> None:
    """Raise UserError if blocks are to be recovered without calibration text to do it on."""
    if settings.recovery_epochs > 0 and not METHODS[init].needs_text:
        raise UserError(
            f"calibration.recovery_epochs={settings.recovery_epochs} needs text, and sparsity.init={init!r} reads "
            "none. Choose sparsegpt or wanda, or set recovery_epochs to 0.",
            "calibration.recovery_epochs",
            "sparsity.init",
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widened(value: Any) -> Any:
    """A tensor of 16-bit floats in float32; anything else as it is."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(_wide(value.dtype)) if is_float else value
