"""The teacher of a run: loaded or copied, compared with the student, cast and frozen."""

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import DistillationConfig
from ast_sparse.data.tokens.vocabulary import Renamed
from ast_sparse.distributed.pieces import is_sharded
from ast_sparse.storage.model_kind import check_direction, check_outputs
from ast_sparse.training.checks.features import check_feature_settings, check_feature_shapes, use_eager_attention
from ast_sparse.training.checks.inputs import check_own_forward, check_vocabularies
from ast_sparse.training.fsdp import processes_of, shard_teacher
from ast_sparse.training.start.reading import load_teacher, teacher_copy, teacher_dtype

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
        teacher = load_teacher(teacher, args, trust_remote_code=trust_remote_code)
    elif teacher is None or teacher is model:
        teacher = teacher_copy(model, args)
        check_own_forward(model, teacher)
    elif not _is_in(teacher, teacher_dtype(args)):  # a given model is not cast in place
        given, teacher = teacher, teacher_copy(teacher, args)
        check_own_forward(given, teacher, "teacher_model")
    if is_other:
        check_outputs(teacher)
        check_direction(teacher.config, "teacher_model" if name is None else name)
        note, renamed = check_vocabularies(model.config, teacher.config, tokenizer, name, trust_remote_code)
        if note is not None and args.should_log:
            logger.warning(f"{note}.")
    check_feature_shapes(config, model.config, teacher.config)
    use_eager_attention(config, model, teacher, bool(args.should_log))
    return teacher.requires_grad_(False).eval(), renamed


def _is_in(model: nn.Module, dtype: torch.dtype | None) -> bool:
    return dtype is None or all(parameter.dtype == dtype for parameter in model.parameters())


def place_teacher(
    teacher: PreTrainedModel, args: TrainingArguments, plugin: FullyShardedDataParallelPlugin | None
) -> None:
    """Move the teacher to the device of the run, sharded if the student will be; it may be there already."""
    if plugin is None:
        teacher.to(args.device)  # type: ignore[arg-type]
    elif not is_sharded(teacher):
        shard_teacher(teacher, args.device, bool(plugin.reshard_after_forward), processes_of(args))
