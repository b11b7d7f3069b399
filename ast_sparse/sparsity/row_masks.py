"""The first masks and SLoRB of a model whose layers are sparse but empty, each process from its rows of the weights."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.distributed.pieces import local, piece_for, sum_over_pieces, whole
from ast_sparse.schedules import sparsity_at
from ast_sparse.sparsity.layers import SparseLayer, pack_bits
from ast_sparse.sparsity.masks import gradual_mask
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.sparsity.slorb import init_without_text, slorb_init


@torch.no_grad()
def fill_masks(model: nn.Module, sparsity: SparsityConfig, slorb: SLoRBConfig | None = None) -> dict[str, float]:
    """Set masks, start masks and SLoRB by magnitude, as `sparsify_model` sets them, in place; weights do not change.

    A mask that is not made of groups needs its whole layer: one layer at a time is gathered. All processes must call
    this.

    Args:
        model: made sparse on the meta device with these settings, then sharded and given its weights.

    Returns:
        The error of each layer, as `sparsify_model` reports it; none for IMP and GMP.
    """
    layers = sparse_layers(model)
    squares = []
    for layer in layers.values():
        weight, mask = local(layer.weight), local(layer.mask)
        mask.copy_(_first_mask(layer, sparsity))
        local(layer.start_mask).copy_(pack_bits(mask, layer.group_dim))
        kept = torch.where(mask, weight, 0)
        squares.append(torch.stack([(weight - kept).square().sum(), weight.square().sum()]))
        if layer.slorb is not None and slorb is not None:
            start, projection = slorb_init(weight, kept, layer.slorb.k, init_without_text(slorb))
            local(layer.slorb.S).copy_(start)
            local(layer.slorb.X).copy_(piece_for(projection, layer.slorb.X))
    if sparsity.is_gradual or not layers:
        return {}
    sums = sum_over_pieces(torch.stack(squares), next(iter(layers.values())).weight).tolist()
    smallest = torch.finfo(torch.float32).tiny
    return {name: lost / max(total, smallest) for name, (lost, total) in zip(layers, sums, strict=True)}


def _first_mask(layer: SparseLayer, sparsity: SparsityConfig) -> Tensor:
    """The first mask of this process's rows of a layer."""
    if layer.pattern.structured and not sparsity.is_gradual:
        return layer.magnitude_mask()
    scores = whole(layer.weight).abs()
    if sparsity.is_gradual:  # the first round
        mask = gradual_mask(scores, layer.pattern, sparsity_at(sparsity, 0, sparsity.rounds))
    else:
        mask = layer.pattern.mask(scores)
    return piece_for(mask, layer.weight) if isinstance(layer.weight, DTensor) else mask
