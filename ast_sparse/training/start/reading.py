"""Student and teacher of a run, read or copied into their dtype, and in a sharded run split before they have values."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from ast_sparse.distributed.pieces import is_sharded
from ast_sparse.sparsity.masked_gather import prepare_gathers
from ast_sparse.storage.load import load_causal_lm, random_causal_lm
from ast_sparse.storage.rows import Shard, copied, read_causal_lm
from ast_sparse.storage.tied import untie_head
from ast_sparse.training.fsdp import check_shardable, processes_of, shard_teacher, sharding_plugin, without_weights
from ast_sparse.training.sharding import frame_of, shard_student


def load_student(
    name_or_path: str | Path, args: TrainingArguments, *, whole: bool = False, seed: int | None = None,
    untied: bool = False, **options: Any,
) -> PreTrainedModel:  # fmt: skip
    """The dense student in float32. In a sharded run each process reads its rows of it onto `args.device`.

    Args:
        whole: every process gets the whole model on the CPU, even in a sharded run.
        seed: random weights from the configuration; None: the weights are read.
        untied: the output head gets a weight of its own if it shares the embedding's.
        options: other arguments of `load_causal_lm`.

    Raises:
        UserError: the model cannot be read, or not be sharded.
    """
    if whole or sharding_plugin(args) is None:
        if seed is None:
            model = load_causal_lm(name_or_path, **options)
        else:
            model = random_causal_lm(name_or_path, seed, **options)
        if untied:
            untie_head(model)
        return model

    def shard(model: PreTrainedModel) -> None:
        check_shardable(model)
        shard_student(model, args)

    model = read_causal_lm(name_or_path, shard, device=args.device, seed=seed, untied=untied, **options)
    prepare_gathers(model)
    return model


def load_teacher(name_or_path: str | Path, args: TrainingArguments, **options: Any) -> PreTrainedModel:
    """The teacher, read straight into its dtype; in a sharded run onto `args.device`, sharded.

    Args:
        options: other arguments of `load_causal_lm`.

    Raises:
        UserError: the model cannot be read.
    """
    shard, device = _teacher_place(args)
    return read_causal_lm(name_or_path, shard, dtype=teacher_dtype(args), device=device, **options)


def teacher_copy(model: PreTrainedModel, args: TrainingArguments) -> PreTrainedModel:
    """A copy of a model as `load_teacher` would read it: cast, and sharded in a sharded run.

    Args:
        model: whole or sharded; not changed. In a sharded run all processes must call this.
    """
    shard, device = _teacher_place(args)
    frame = without_weights(frame_of(model) if is_sharded(model) else model)
    if shard is not None:
        shard(frame)
    return copied(model, frame, teacher_dtype(args), device)


def teacher_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The dtype that the matrix products of a run are computed in, and the teacher kept in; None: that of the model.

    Buffers, such as rotary frequencies, stay float32.
    """
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _teacher_place(args: TrainingArguments) -> tuple[Shard | None, torch.device | None]:
    """How the teacher is split, and the device of what is not split; None and None without sharding."""
    plugin = sharding_plugin(args)
    if plugin is None:
        return None, None
    again = bool(plugin.reshard_after_forward)
    mesh = processes_of(args)
    return partial(shard_teacher, device=args.device, reshard_after_forward=again, mesh=mesh), args.device
