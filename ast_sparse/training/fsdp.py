"""Sharded training (FSDP2) through accelerate: its settings, the frozen teacher, and gathering the student.

The student is sharded in `sharding.py`, with SLoRB and the optimizer state.
"""

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D
from transformers.trainer import OPTIMIZER_NAME
from transformers.training_args import ParallelMode

from ast_sparse.distributed.mesh import process_grid
from ast_sparse.distributed.pieces import local, piece_for, unwrapped_name
from ast_sparse.errors import UserError, did_you_mean, one_line
from ast_sparse.optim import SparseAdamW
from ast_sparse.sparsity.model import decoder_blocks
from ast_sparse.storage.files import weight_files
from ast_sparse.storage.sharded import MODEL_FOLDER, OPTIMIZER_FOLDER, is_sharded_checkpoint, read_tensors
from ast_sparse.training.checks.parallelism import grid_of

_KEYS = (
    "version", "reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap", "min_num_params",
    "activation_checkpointing", "state_dict_type", "cpu_ram_efficient_loading", "cpu_offload",
)  # fmt: skip
_STATE_DICT = "SHARDED_STATE_DICT"
_LAUNCH = "Start with `accelerate launch --config_file configs/accelerate/fsdp2.yaml` or torchrun"


def env_flag(name: str) -> bool:
    """Whether `accelerate launch` has turned an option on."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def sharding_plugin(args: TrainingArguments) -> FullyShardedDataParallelPlugin | None:
    """The settings of FSDP2, from `args.fsdp` and `args.fsdp_config` or from `accelerate launch`; None without FSDP.

    Raises:
        UserError: FSDP1, or a setting under which masks do not follow their weights.
    """
    if not (args.fsdp or env_flag("ACCELERATE_USE_FSDP")):
        if args.fsdp_config:
            raise UserError(
                f"training.fsdp_config={args.fsdp_config!r} would be ignored. Set fsdp: true, or remove it."
            )
        return None
    where = "training.fsdp_config" if args.fsdp else "fsdp_config of `accelerate launch`"
    if args.fsdp:
        _check_keys(cast(dict[str, Any], args.fsdp_config))
    version = args.fsdp_plugin_args["fsdp_version"] if args.fsdp else int(os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        raise UserError(
            f"{where}: version {version} flattens weights and masks into one tensor. Set fsdp_version: 2 (FSDP2)."
        )
    try:
        plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args if args.fsdp else {}))
    except (ValueError, KeyError, ImportError) as error:  # from its many checks
        raise UserError(f"{where}: {one_line(error, end='open')}. Correct it.") from None
    if plugin.cpu_ram_efficient_loading:
        raise UserError(
            f"{where}: with cpu_ram_efficient_loading only one process has the weights, and all of them make masks "
            "from them. Set it to false."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError(f"{where}: cpu_offload does not work with masks. Remove it; use more GPUs.")
    if plugin.ignored_modules is not None:
        raise UserError(f"{where}: ignored_modules would not get the gradients of other processes. Remove it.")
    if args.save_only_model:
        raise UserError(
            "training.save_only_model=True does not work in a sharded run, whose checkpoints can only be resumed. "
            "Remove it; ast-export turns a checkpoint into an ordinary model."
        )
    return plugin


def _check_keys(config: dict[str, Any]) -> None:
    """Refuse names that transformers would ignore, and values that a sharded run cannot have."""
    for key, value in config.items():
        if key.startswith("xla") and not value:  # transformers adds its defaults
            continue
        if key.startswith("xla"):
            raise UserError(f"training.fsdp_config: {key} is not supported. Remove it.")
        if key not in _KEYS:
            hint = did_you_mean(key, _KEYS) or f"Choose from {', '.join(_KEYS)}."
            raise UserError(f"training.fsdp_config: there is no {key!r}. {hint}")
    state = config.get("state_dict_type", _STATE_DICT)
    if str(state).upper() != _STATE_DICT:
        raise UserError(
            f"training.fsdp_config: state_dict_type={state!r}: checkpoints of a sharded run are sharded. Remove it; "
            "ast-export turns one into an ordinary model."
        )


def check_sharding(args: TrainingArguments) -> None:
    """Raise UserError if sharding is asked for without a launcher, or over another number of processes."""
    if sharding_plugin(args) is None:
        return
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError(
            f"training.fsdp={args.fsdp} needs processes to shard over. {_LAUNCH} (`torchrun --nproc_per_node N`), or "
            "remove it."
        )
    grid_of(args)


def check_shardable(model: nn.Module) -> None:
    """Raise UserError for a Conv1D, whose groups FSDP2 would cut along dim 0, or for blocks that share weights."""
    name = next((name for name, module in model.named_modules() if isinstance(module, Conv1D)), None)
    if name is not None:
        raise UserError(
            f"`{name}` is a Conv1D, whose mask groups FSDP2 would cut. Remove training.fsdp; use DDP (torchrun)."
        )
    first: dict[nn.Parameter, str] = {}
    for block_name, block in decoder_blocks(model).items():
        for key, parameter in block.named_parameters():
            if first.setdefault(parameter, block_name) != block_name:
                raise UserError(
                    f"`{block_name}.{key}` is also a weight of `{first[parameter]}`, and FSDP2 cannot shard a weight "
                    "that two blocks share. Remove training.fsdp; use DDP (torchrun)."
                )


def use_plugin(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin, args: TrainingArguments) -> None:
    """Complete the settings that accelerate has read.

    Checkpoints are sharded; gradients are summed in float32, even if the blocks compute in bf16. Between CPU processes
    accelerate 1.15 ignores the settings and uses DDP: the state that is set here is all that its FSDP2 path checks, so
    that path then runs as on GPUs.
    """
    state = accelerator.state
    if accelerator.device.type == "cpu":
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = plugin
    plugin = state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type(_STATE_DICT)
    plugin.mixed_precision_policy = mixed_precision(args) or plugin.mixed_precision_policy
    plugin.activation_checkpointing, plugin.auto_wrap_policy = False, None  # `shard_student` does both
    accelerator.prepare = partial(_prepare, accelerator.prepare)


def mixed_precision(args: TrainingArguments) -> MixedPrecisionPolicy | None:
    """The dtypes of the student's forward and backward pass and of the sum of gradients; None: as the weights."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    return None if half is None else MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)


def _prepare(prepare: Callable[..., Any], *objects: Any, **kwargs: Any) -> Any:
    """`Accelerator.prepare`, after which optimizers have the parameters that they had before.

    accelerate finds them again by their addresses, but pieces without rows have none. The model is sharded already, so
    they are the same.
    """
    optimizers = [each for each in objects if isinstance(each, torch.optim.Optimizer)]
    before = [[list(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
    prepared = prepare(*objects, **kwargs)
    for optimizer, groups in zip(optimizers, before, strict=True):
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = parameters
    return prepared


def processes_of(args: TrainingArguments) -> DeviceMesh:
    """The processes that models are sharded over: in one dimension, or replicas and the processes of each."""
    return process_grid(args.device.type, *grid_of(args))


def shard_teacher(
    teacher: PreTrainedModel, device: torch.device, reshard_after_forward: bool, mesh: DeviceMesh
) -> None:
    """Shard a frozen model block by block, in place; embeddings, last norm and head stay whole on every process.

    So a forward pass may start at the model or at its decoder, and the head may be called alone.

    Args:
        device: of training; never has more than one whole block.
        mesh: as for the student; each replica has a whole teacher.
    """
    for block in decoder_blocks(teacher).values():
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    inside = {p for block in decoder_blocks(teacher).values() for p in block.parameters()}
    outside = [p for p in teacher.parameters() if p not in inside]
    for tensor in (*outside, *teacher.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    # the root, so that the blocks overlap; not the decoder, which transformers recognises only by its class
    fully_shard(teacher, mesh=mesh, ignored_params=set(outside))


def without_weights(model: PreTrainedModel, same_settings: bool = False) -> PreTrainedModel:
    """A copy of a model whose parameters are on the meta device and take no memory.

    Args:
        same_settings: the copy has the configurations of the model itself, and sees what is changed in them later.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for module in model.modules() if same_settings else ():
        kept = (getattr(module, name, None) for name in ("config", "generation_config"))
        memo |= {id(each): each for each in kept if each is not None}
    return copy.deepcopy(model, memo)


def gathered(sharded: nn.Module, frame: PreTrainedModel) -> PreTrainedModel | None:
    """The whole model, on the CPU of the first process; None on the others. Every process must call this.

    Args:
        frame: the model before it was sharded, `without_weights`; not changed.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(sharded, options=options)
    if not weights:
        return None
    model = without_weights(frame)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return cast(PreTrainedModel, model.eval())


@torch.no_grad()
def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load weights, masks and SLoRB of a checkpoint into a model; one of the two may be sharded.

    Raises:
        UserError: the checkpoint lacks a tensor of the model, or it has another shape.
    """
    if is_sharded_checkpoint(checkpoint):
        stored = read_tensors(checkpoint / MODEL_FOLDER)
    else:
        stored = {name: tensor for file in weight_files(checkpoint) for name, tensor in load_file(file).items()}
    for name, live in model.named_parameters():  # tied ones once
        _fill(live, stored.get(unwrapped_name(name)), f"{checkpoint}: `{name}`")
    for name, buffer in model.named_buffers():
        if (found := stored.get(unwrapped_name(name))) is not None:
            buffer.copy_(found)


@torch.no_grad()
def load_moments(checkpoint: Path, model: nn.Module, optimizer: SparseAdamW) -> None:
    """Load the state of a checkpoint into an optimizer, if one of the two is sharded; its groups do not change.

    Raises:
        UserError: the checkpoint lacks the state of a parameter, or it has another shape.
    """
    names: dict[Tensor, str] = {parameter: unwrapped_name(name) for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[Tensor, dict[str, Tensor]] = {parameter: {} for parameter in parameters}
    if is_sharded_checkpoint(checkpoint):
        stored = read_tensors(checkpoint / OPTIMIZER_FOLDER, lambda name: name.startswith("optimizer.state."))
        for parameter in parameters:
            prefix = f"state.{names[parameter]}."
            states[parameter] = {key.removeprefix(prefix): v for key, v in stored.items() if key.startswith(prefix)}
    else:  # by position: the groups have the same order
        saved = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)["state"]
        states |= {parameter: saved[index] for index, parameter in enumerate(parameters) if index in saved}
    for parameter, state in states.items():
        if state:  # otherwise it was never updated
            for key, live in optimizer.state_of(parameter).items():
                _fill(live, state.get(key), f"{checkpoint}: {key} of `{names[parameter]}`")


def _fill(live: Tensor, stored: Tensor | None, what: str) -> None:
    """Copy a whole tensor into a live one, or into this process's piece of it."""
    if stored is None or stored.shape != live.shape:
        found = "is missing" if stored is None else f"has shape {tuple(stored.shape)}, the run {tuple(live.shape)}"
        raise UserError(f"{what} {found}. Resume from another checkpoint.")
    local(live).copy_(piece_for(stored.to(local(live).device), live))
