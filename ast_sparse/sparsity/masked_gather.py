"""FSDP2's all-gather of masked weights: each process masks its rows before they are sent, so masks stay where they are.

A module of a sharded model gets the weight `m ⊙ W` in the dtype that it computes in, and its gradient is that of the
whole weight (1): the straight-through estimator needs no further code.
"""

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ast_sparse.distributed.pieces import distributed_like, local, reshard
from ast_sparse.kernels.products import masked
from ast_sparse.sparsity.layers import SparseLayer
from ast_sparse.sparsity.masked_piece import carry_mask
from ast_sparse.sparsity.select import decoder_blocks


def prepare_gathers(model: nn.Module) -> None:
    """Let the weights of the linear layers in the blocks carry their masks into the all-gather, in place.

    Dense ones do so too, because FSDP2 looks at a weight only once, before the first forward pass. Call it again when
    layers have become sparse, or their weights have been replaced.
    """
    reshard(model)
    for block in decoder_blocks(model).values():
        for layer in block.modules():
            if isinstance(layer, nn.Linear) and isinstance(layer.weight, DTensor) and not layer.weight.is_meta:
                _prepare(layer)


def _prepare(layer: nn.Linear) -> None:
    weight: Any = layer.weight
    piece = carry_mask(weight, None)
    if not isinstance(layer, SparseLayer):
        return
    if piece.mask is None and layer.fixed_mask and weight.requires_grad:
        weight.register_post_accumulate_grad_hook(_mask_gradient)
    carry_mask(weight, local(layer.mask))
    layer.gathered_masked = True


def _mask_gradient(weight: Any) -> None:
    grad, mask = local(weight.grad), weight._local_tensor.mask
    grad.copy_(masked(grad, mask))


def distribute_masks(model: nn.Module, like: DTensor) -> set[nn.Parameter]:
    """Replace the masks and start masks of a model by each process's rows of them; FSDP2 must ignore the result.

    Args:
        model: not sharded yet, the same on each process; on the meta device the rows are there too.
        like: any tensor that is split as the weights will be.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for layer in model.modules():
        if isinstance(layer, SparseLayer):
            for name in ("mask", "start_mask"):
                whole = getattr(layer, name)
                if whole not in made:
                    made[whole] = nn.Parameter(distributed_like(whole, like), requires_grad=False)
                setattr(layer, name, made[whole])
    return set(made.values())
