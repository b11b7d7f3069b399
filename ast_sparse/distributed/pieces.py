"""Pieces of parameters that FSDP2 has split over the processes (DTensors); plain tensors are accepted too.

FSDP2 cuts dim 0 into one piece per process, so that no group of a Linear's mask is cut. The last pieces may be shorter
or empty.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are split over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 leaves gathered after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, or the plain tensor itself; it shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece_for(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that is local in `like`, which has the same shape; without communication."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def sum_over_pieces(values: Tensor, like: Tensor) -> Tensor:
    """The sum over the processes that have a piece of `like`, equal on each; the values themselves if it is plain."""
    if isinstance(like, DTensor):
        values = values.to(local(like).device)
        torch.distributed.all_reduce(values, group=like.device_mesh.get_group())
    return values
