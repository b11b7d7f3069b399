"""Sharding the student (FSDP2) before accelerate sees it, in the groups that accelerate 1.15 makes.

accelerate takes a model as it is that is sharded already. So masks can stay outside FSDP2, a model can be sharded
before it has weights, and it can be measured before it is trained.
"""

from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.other import get_module_children_bottom_up
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Replicate, Shard
from transformers import PreTrainedModel, TrainingArguments

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.distributed.pieces import reshard, unwrapped_name
from ast_sparse.distributed.ranks import errors_shared
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masked_gather import distribute_masks, prepare_gathers
from ast_sparse.sparsity.model import SparsityReport, sparsify_model
from ast_sparse.sparsity.oneshot import METHODS
from ast_sparse.sparsity.row_masks import fill_masks
from ast_sparse.sparsity.slorb import check_slorb
from ast_sparse.storage.finite import check_finite
from ast_sparse.training.fsdp import mixed_precision, processes_of, sharding_plugin, without_weights

_frames: "WeakKeyDictionary[nn.Module, PreTrainedModel]" = WeakKeyDictionary()


def frame_of(sharded: nn.Module) -> PreTrainedModel:
    """The model as it was before `shard_student`, `without_weights`, with its present settings; not to be changed."""
    return _frames[sharded]


def shard_student(model: PreTrainedModel, args: TrainingArguments, mesh: DeviceMesh | None = None) -> None:
    """Shard a model for training, in place: each block, the embedding, last norm with head, and the rest.

    Afterwards every process has its rows of each parameter, on `args.device`, and the whole model has no copy left.
    Masks are split like their weights, but FSDP2 does not know them. A model on the meta device stays there: call
    `allocate_pieces`, then fill `local(parameter)` of each parameter. Its buffers must have their values before.

    Args:
        model: dense or sparse, the same on each process.
        args: have FSDP2 on; activation checkpointing, dtypes and groups are as they say.
        mesh: of one dimension, or of two: replicas, and the processes that a replica is split over. Default: as `args`
            say.
    """
    plugin = sharding_plugin(args)
    assert plugin is not None, "FSDP2 is off"
    _frames[model] = without_weights(model, same_settings=True)
    mesh = processes_of(args) if mesh is None else mesh
    plugin.set_auto_wrap_policy(model)
    if plugin.activation_checkpointing:
        _checkpoint_blocks(model, plugin)
    policy = mixed_precision(args) or MixedPrecisionPolicy()
    if policy.param_dtype is not None:  # master weights, as in accelerate
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = parameter.data.to(torch.float32)
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    like = distribute_tensor(torch.empty(1, device="meta"), mesh, placements, src_data_rank=None)
    masks = distribute_masks(model, like)
    _shard_groups(model, plugin, {"mesh": mesh, "mp_policy": policy, "ignored_params": masks})
    prepare_gathers(model)


def sparsify_sharded(
    model: PreTrainedModel, args: TrainingArguments, sparsity: SparsityConfig, slorb: SLoRBConfig | None = None
) -> tuple[PreTrainedModel, SparsityReport]:
    """The sparse form of a dense model that `shard_student` has sharded, from each process's rows, by magnitude.

    FSDP2 cannot take in the parameters of SLoRB later, so the result is another model. It has the weights of the given
    one, which must not be used any more. Every process must call this.

    Raises:
        UserError: as `sparsify_model`, or `sparsity.init` needs text: such a model is made sparse before it is sharded.
    """
    if METHODS[sparsity.init].needs_text:
        raise UserError(
            f"sparsity.init={sparsity.init!r} needs the whole model. Do not shard it before SparseTrainer does.",
            "sparsity.init",
        )
    check_slorb(sparsity.init, slorb)
    with errors_shared():
        check_finite(model)
    reshard(model)
    dense = {unwrapped_name(name): each for name, each in model.named_parameters(remove_duplicate=False)}
    sparse = without_weights(frame_of(model))
    report = sparsify_model(sparse, sparsity, slorb)
    shard_student(sparse, args, cast(DTensor, next(iter(dense.values()))).device_mesh)
    given = {weight: nn.Parameter(weight.detach(), weight.requires_grad) for weight in dense.values()}
    for prefix, module in sparse.named_modules(remove_duplicate=False):
        for name, _ in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            weight = dense.get(unwrapped_name(f"{prefix}.{name}").removeprefix("."))
            if weight is not None:
                setattr(module, name, given[weight])
    allocate_pieces(sparse, args.device)  # masks and SLoRB
    errors = fill_masks(sparse, sparsity, slorb)
    return sparse.train(model.training), replace(report, errors=errors)


def _checkpoint_blocks(model: nn.Module, plugin: FullyShardedDataParallelPlugin) -> None:
    is_group = fsdp2_prepare_auto_wrap_policy(plugin, model)
    for name, module in get_module_children_bottom_up(model, return_fqns=True)[:-1]:
        if is_group is not None and is_group(module):
            model.set_submodule(name, checkpoint_wrapper(module, preserve_rng_state=False))


def _shard_groups(model: PreTrainedModel, plugin: FullyShardedDataParallelPlugin, options: dict[str, Any]) -> None:
    """Shard the groups of parameters that are gathered together, from the inside to the outside."""
    inner = {**options, "reshard_after_forward": plugin.reshard_after_forward}
    is_group = fsdp2_prepare_auto_wrap_policy(plugin, model)
    for module in get_module_children_bottom_up(model)[:-1]:
        if is_group is not None and is_group(module) and not isinstance(module, FSDPModule):
            fully_shard(module, **inner)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(embedding, "weight", None) is not None and embedding.weight is getattr(head, "weight", None)
    if not tied and embedding is not None and not isinstance(embedding, FSDPModule):
        fully_shard(embedding, **inner)
    # a tied weight belongs to one group: with the embedding first, it is gathered when the forward pass begins
    last = [_last_norm(model), embedding, head] if tied else [_last_norm(model), head]
    last = [module for module in last if module is not None and not isinstance(module, FSDPModule)]
    if last:  # the backward pass needs it at once
        fully_shard(cast(Any, last), **options, reshard_after_forward=False)
    fully_shard(model, **options)


def _last_norm(model: PreTrainedModel) -> nn.Module | None:
    base = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else model
    children = base.children() if isinstance(base, nn.Module) else ()
    return next((child for child in reversed(list(children)) if "Norm" in type(child).__name__), None)


def allocate_pieces(model: nn.Module, device: torch.device) -> None:
    """Give the parameters of a model that was sharded on the meta device memory for this process's rows, not filled.

    Buffers stay as they are.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if parameter not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, made[parameter])
    model.load_state_dict({}, strict=False)  # FSDP2 sees the new parameters, and adds rows that all pieces be as long
    prepare_gathers(model)
