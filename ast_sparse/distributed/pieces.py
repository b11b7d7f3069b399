"""Parameters that FSDP2 has split over the processes (DTensors), and plain tensors alike.

FSDP2 cuts dim 0 into one piece a process, so a Linear keeps the groups of its masks whole; the last pieces may be
shorter, or empty.
"""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are split over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 leaves whole after a forward pass that no backward pass follows; nothing else to do."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The piece of this process; of a plain tensor, all of it. Shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; every one must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece_for(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that belongs to the local piece of `like`, which has the same shape; no messages."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """Sum over the processes that hold a piece of `like`, the same on each; of a plain tensor the values themselves."""
    if isinstance(like, DTensor):
        values = values.to(local(like).device)
        torch.distributed.all_reduce(values, group=like.device_mesh.get_group())
    return values
