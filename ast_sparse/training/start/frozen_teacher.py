"""The teacher of a run: loaded or copied, compared with the student, cast and frozen."""

import copy

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import DistillationConfig
from ast_sparse.data.tokens.vocabulary import Renamed
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.training.checks.features import check_feature_settings, check_feature_shapes, use_eager_attention
from ast_sparse.training.checks.inputs import check_vocabularies
from ast_sparse.training.fsdp import shard_teacher

logger = logging.get_logger(__name__)


def frozen_teacher(
    model: PreTrainedModel,
    teacher: PreTrainedModel | str | None,
    config: DistillationConfig | None,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool,
) -> tuple[nn.Module | None, Renamed]:
    """The teacher, outside the student's module tree, and the tokens that it has under other names.

    Args:
        model: the student, still dense.
        teacher: a model, or the name of one; None: the student as it is now.
        tokenizer: of the student.
        trust_remote_code: run code that comes with the teacher.

    Returns:
        None instead of the teacher if the KL has no weight.

    Raises:
        UserError: the teacher cannot be read, or its vocabulary, shapes or settings do not fit the student.
    """
    renamed: Renamed = {}
    if config is None or not config.needs_teacher:
        return None, renamed
    check_feature_settings(config, model.config, args)
    is_other, name = teacher is not None and teacher is not model, teacher if isinstance(teacher, str) else None
    if isinstance(teacher, str):
        teacher = load_causal_lm(teacher, trust_remote_code=trust_remote_code)
    elif teacher is None or teacher is model or args.bf16 or args.fp16:  # a given model is not cast in place
        teacher = copy.deepcopy(model if teacher is None else teacher)
    if is_other:
        note, renamed = check_vocabularies(model.config, teacher.config, tokenizer, name, trust_remote_code)
        if note is not None and args.should_log:
            logger.warning(f"{note}.")
    check_feature_shapes(config, model.config, teacher.config)
    use_eager_attention(config, model, teacher, bool(args.should_log))
    if args.bf16 or args.fp16:  # its matrix products run in this dtype anyway
        for parameter in teacher.parameters():  # not `.to`: buffers, such as rotary frequencies, stay float32
            parameter.data = parameter.data.to(torch.bfloat16 if args.bf16 else torch.float16)
    return teacher.requires_grad_(False).eval(), renamed


def place_teacher(
    teacher: PreTrainedModel, args: TrainingArguments, plugin: FullyShardedDataParallelPlugin | None
) -> None:
    """Move the teacher to the device of the run, sharded if the student will be."""
    if plugin is None:
        teacher.to(args.device)  # type: ignore[arg-type]
    else:
        shard_teacher(teacher, args.device, bool(plugin.reshard_after_forward))
