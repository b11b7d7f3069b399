"""Layers of a plain model whose weights are N:M already, and keeping them so while the model is trained."""

import re
from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ast_sparse.config import SparsityConfig
from ast_sparse.distributed.pieces import local, sum_over_pieces
from ast_sparse.errors import UserError
from ast_sparse.sparsity.layers import SparseLayer, group_dim_of
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.select import Prunable, decoder_blocks

logger = logging.get_logger(__name__)

_WRAPPED = re.compile(r"^base_model\.model\.|\.(base_layer|original_module)(?=\.|$)")


def nm_layers(model: nn.Module, pattern: Pattern, recorded: Collection[str] = ()) -> dict[str, Prunable]:
    """The linear layers in the decoder blocks whose weights fit a pattern, by name; layers with one weight appear once.

    Why they fit does not matter, so routers and layers below an adapter are among them. A layer that is zero throughout
    is not, unless it is recorded.

    Args:
        model: causal LM; FSDP2 may have sharded it, and PEFT may have wrapped it or its layers.
        recorded: names of layers that are known to be pruned, as in the plain model.

    Raises:
        UserError: a recorded layer does not fit, or none does.
    """
    found: dict[Tensor, tuple[str, Prunable]] = {}
    inside = tuple(f"{name}." for name in decoder_blocks(model))
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is None or not isinstance(layer, nn.Linear | Conv1D) or not name.startswith(inside):
            continue
        if weight in found or not weight.is_floating_point():  # integers are the codes of a quantizer
            continue
        known = plain_name(name) in recorded
        fits, is_filled = _fits(layer, pattern)
        if fits and (is_filled or known):
            found[weight] = name, layer
        elif known:
            raise UserError(f"`{name}` is recorded as pruned, but its weight is not {pattern}. Load the sparse model.")
    if not found:
        raise UserError(
            f"No layer of {type(model).__name__} is {pattern}. Load a sparse model, or name its pattern with `pattern`."
        )
    return dict(found.values())


def plain_name(name: str) -> str:
    """The name that a layer has without PEFT, which wraps models and the layers below an adapter."""
    return _WRAPPED.sub("", name)


def _fits(layer: Prunable, pattern: Pattern) -> tuple[bool, bool]:
    """Whether the weight of a layer fits a pattern, and whether it has non-zeros."""
    weight, dim = layer.weight, group_dim_of(layer)
    if isinstance(weight, DTensor) and dim == 0:
        raise UserError("FSDP2 cuts the groups of a Conv1D. Train this model with DDP (torchrun), without FSDP.")
    piece = local(weight.detach())
    fault = pattern.structured and not pattern.holds(piece, dim)
    faults, filled = sum_over_pieces(torch.tensor([int(fault), int(piece.count_nonzero())]), weight).tolist()
    if not pattern.structured:  # a share of the whole weight, not of each piece
        faults = int(filled > weight.numel() * pattern.n // pattern.m)
    return faults == 0, filled > 0


class KeptSparsity:
    """What `keep_sparsity` returns. Call `apply` after each optimizer step, and `check` at the end.

    Attributes:
        layers: the layers that are kept N:M, by name.
        pattern: their pattern.
    """

    def __init__(self, layers: dict[str, Prunable], pattern: Pattern) -> None:
        self.layers, self.pattern = layers, pattern
        self._masks: dict[Tensor, Tensor] = {
            layer.weight: local(layer.weight.detach()) != 0 for layer in layers.values()
        }
        trained = [weight for weight in self._masks if weight.requires_grad]
        self._hooks: list[RemovableHandle] = [
            weight.register_post_accumulate_grad_hook(self._mask_gradient) for weight in trained
        ]
        if not trained:
            logger.warning(
                "The %d %s layers are frozen, so they stay as they are. An adapter that is trained over them is merged "
                "under their masks by `merge_adapter_sparse`.", len(layers), pattern,
            )  # fmt: skip

    def mask(self, name: str) -> Tensor:
        """The mask of a layer, bool, True = kept; of this process's piece if the layer is sharded."""
        return self._masks[self.layers[name].weight]

    @torch.no_grad()
    def apply(self) -> None:
        """Make pruned weights exactly 0.0 again, whatever the optimizer did to them."""
        for weight, mask in self._masks.items():
            if weight.requires_grad:
                local(weight).masked_fill_(~mask, 0)

    @torch.no_grad()
    def settle(self) -> None:
        """Count every weight that is exactly zero as pruned from now on.

        Call it when the weights are saved: a run that continues from the files finds its masks in their zeros, and
        cannot tell a kept weight that happens to be zero from a pruned one.
        """
        for weight, mask in self._masks.items():
            mask &= local(weight) != 0

    def check(self) -> None:
        """Raise UserError if a layer is no longer N:M."""
        for name, layer in self.layers.items():
            if not _fits(layer, self.pattern)[0]:
                raise UserError(
                    f"`{name}` is no longer {self.pattern}: something else than the optimizer changed it. Leave the "
                    "weights of sparse layers to the optimizer."
                )

    def remove(self) -> None:
        """Let the weights be trained freely again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _mask_gradient(self, weight: Tensor) -> None:
        local(cast(Tensor, weight.grad)).masked_fill_(~self._masks[weight], 0)


def keep_sparsity(model: nn.Module, pattern: str | None = None, recorded: Collection[str] = ()) -> KeptSparsity:
    """Keep the N:M layers of a plain model N:M while it is trained; the zeros of their weights are the masks.

    From now on, gradients of pruned weights are zero when the backward pass ends: before they are accumulated,
    averaged over processes or clipped. So AdamW's moments of pruned weights stay zero. The optimizer step itself may
    still move them (momentum of an earlier run, an optimizer that mixes weights): call `apply` after each.

    Args:
        model: causal LM on its device, as it is trained; under FSDP2, after it was sharded.
        pattern: N:M of its weights; default: 2:4. A group may have more zeros: they are pruned too.
        recorded: names of layers that are known to be pruned (`sparsity_config.json`); others are found by their zeros.

    Raises:
        UserError: a layer is compressed or trained with masks already, no layer is N:M, or a recorded one is not.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            raise UserError(f"`{name}` has a mask already. Train with SparseTrainer, or call `densify_model` first.")
        if "weight_meta" in module._buffers:
            raise UserError(
                f"`{name}` is compressed in memory, and compressed weights cannot be trained. Load the model without "
                "`dequantize=False`."
            )
    checked = Pattern.of(SparsityConfig(pattern=pattern or "2:4"))
    return KeptSparsity(nm_layers(model, checked, recorded), checked)
