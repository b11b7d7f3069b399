"""Pieces of parameters that FSDP2 has split over the processes (DTensors); plain tensors are accepted too.

FSDP2 cuts dim 0 into one piece per process, so that no group of a Linear's mask is cut. The last pieces may be shorter
or empty. Under hybrid sharding there are several replicas: each piece is on one process of every replica.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ast_sparse.errors import UserError

CHECKPOINTED = "_checkpoint_wrapped_module"  # the attribute of FSDP's wrapper for activation checkpointing
_COMPILED = "_orig_mod"  # and that of torch.compile's


def unwrapped_name(name: str) -> str:
    """The name of a parameter or module without wrappers for activation checkpointing and of torch.compile."""
    return name.replace(f"{CHECKPOINTED}.", "").replace(f"{_COMPILED}.", "")


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are split over the processes, also while FSDP2 has gathered them."""
    return isinstance(model, FSDPModule) or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def refuse_sharded(model: nn.Module, fix: str) -> None:
    """Raise UserError, with the way out, if parameters of a model are split over the processes."""
    if is_sharded(model):
        raise UserError(f"The model is sharded: each process has only its piece of a weight. {fix}")


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 leaves gathered after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor, or the plain tensor itself; it shares the memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    piece = tensor.to_local()
    # the class of a piece that changes what FSDP2 gathers is of no use to others
    return piece.as_subclass(Tensor) if hasattr(piece, "fsdp_pre_all_gather") else piece


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every process; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece_for(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that is local in `like`, which has the same shape; without communication."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def rows_of(tensor: Tensor) -> slice:
    """The rows of a whole tensor that are this process's piece: FSDP2 cuts dim 0; all rows of a plain tensor."""
    rows = tensor.shape[0]
    if isinstance(tensor, DTensor):
        for dim, placement in enumerate(tensor.placements):
            if isinstance(placement, Shard):  # the other dimensions of a mesh hold copies
                each = -(-rows // tensor.device_mesh.size(dim))
                start = min(rows, tensor.device_mesh.get_local_rank(dim) * each)
                return slice(start, min(rows, start + each))
    return slice(0, rows)


def distributed_like(tensor: Tensor, like: DTensor) -> DTensor:
    """A whole tensor that every process has, split as `like` is; each keeps a copy of its own rows."""
    placements = like.placements
    if tensor.is_meta:
        return distribute_tensor(tensor, like.device_mesh, placements, src_data_rank=None)
    piece = distribute_tensor(tensor.detach(), like.device_mesh, placements, src_data_rank=None).to_local()
    return pieces_as_whole(piece.to(like.device_mesh.device_type).clone(), like, tensor.shape)


def pieces_as_whole(piece: Tensor, like: DTensor, shape: Sequence[int] | None = None) -> DTensor:
    """The tensor that the pieces of all processes make up, split over rows as `like` is; without communication.

    Args:
        piece: `[rows of this process, ...]`.
        shape: of the whole; default: as many rows as `like`.
    """
    whole = torch.Size((like.shape[0], *piece.shape[1:]) if shape is None else shape)
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(piece, like.device_mesh, like.placements, run_check=False, shape=whole, stride=stride)


def sum_over_pieces(values: Tensor, like: Tensor) -> Tensor:
    """The sum over the processes that have the pieces of `like`, equal on each; the values themselves if it is plain.

    Under hybrid sharding each replica sums its own.
    """
    if isinstance(like, DTensor):
        values = values.to(local(like).device)
        for dim, placement in enumerate(like.placements):
            if isinstance(placement, Shard):
                dist.all_reduce(values, group=like.device_mesh.get_group(dim))
    return values


def differs_between_copies(values: Tensor, like: Tensor) -> Tensor:
    """Whether values differ between the processes that should have equal ones, entry by entry, equal on each.

    These are the processes that have the same piece of `like`: with a plain tensor all of them, under hybrid sharding
    one of each replica, and without replicas none. One all-reduce, which does not wait for a device.

    Args:
        values: int64, from −2⁶² to 2⁶².
    """
    extremes = torch.stack([values, -values])
    for group in _copies(like):
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    return extremes[0] != -extremes[1]


def has_copies(like: Tensor) -> bool:
    """Whether other processes have the same piece of a tensor, or the same plain tensor."""
    return bool(_copies(like))


def _copies(like: Tensor) -> list[dist.ProcessGroup | None]:
    """The groups of processes that have equal pieces; None is the group of all processes."""
    if isinstance(like, DTensor):
        mesh = like.device_mesh
        return [mesh.get_group(dim) for dim, each in enumerate(like.placements) if not isinstance(each, Shard)]
    return [None] if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else []
