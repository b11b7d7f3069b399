"""What distillation of hidden states and attention maps needs from student, teacher and settings; checked first."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.features import needs_attention, needs_hidden
from ast_sparse.distributed.pieces import reshard
from ast_sparse.errors import UserError, one_line

logger = logging.get_logger(__name__)

_PROBE_TOKENS = 2


def check_feature_settings(
    config: DistillationConfig | None, student: PreTrainedConfig, args: TrainingArguments
) -> None:
    """Refuse what does not work with the kinds of distillation that look inside the blocks; other kinds pass.

    Raises:
        UserError: all weights are 0, attention weights are dropped at random, or `torch_compile` or reentrant
            activation checkpointing would hide the features.
    """
    if config is None or not config.needs_teacher:
        return
    kind = f"distillation.kind={config.kind!r}"
    if not (needs_hidden(config) or needs_attention(config)):
        if config.kind == "mobilebert":
            raise UserError(
                f"{kind} with hidden_weight and attention_weight 0 distils nothing. Raise one of them, or set alpha: 0."
            )
        return
    dropped_blocks = getattr(student.get_text_config(), "layerdrop", 0.0)
    if isinstance(dropped_blocks, float) and dropped_blocks > 0:
        raise UserError(
            f"{kind} compares block by block, and layerdrop={dropped_blocks} of the student leaves blocks out. "
            "Set model.config_overrides: {layerdrop: 0.0}."
        )
    if args.torch_compile:
        raise UserError(f"training.torch_compile=True hides the features that {kind} compares. Remove one of them.")
    options = args.gradient_checkpointing_kwargs
    if args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
        raise UserError(
            "training.gradient_checkpointing_kwargs={'use_reentrant': True} detaches the features that "
            f"{kind} compares. Set use_reentrant: false."
        )
    if needs_attention(config) and (dropped := next(_attention_dropout(student.get_text_config().to_dict()), None)):
        name, value = dropped
        raise UserError(
            f"{kind} compares attention maps, and {name}={value} of the student drops parts of them at random. "
            f"Set model.config_overrides: {{{name}: 0.0}}, or distillation.attention_weight: 0."
        )


def _attention_dropout(values: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """Settings of a model that drop attention weights, also in nested sections."""
    for key, value in values.items():
        name = str(key)  # label maps have numbers
        if isinstance(value, dict):
            yield from _attention_dropout(value)
        elif "att" in name and "drop" in name and isinstance(value, float) and value > 0:
            yield name, value


def check_feature_shapes(
    config: DistillationConfig | None, student: PreTrainedConfig, teacher: PreTrainedConfig
) -> None:
    """Raise UserError if teacher and student cannot be compared block by block."""
    if config is None or not (needs_hidden(config) or needs_attention(config)):
        return
    keys = ["num_hidden_layers"]
    keys += ["hidden_size"] if needs_hidden(config) else []
    keys += ["num_attention_heads"] if needs_attention(config) else []
    for key in keys:
        ours, theirs = (getattr(each.get_text_config(), key, None) for each in (student, teacher))
        if ours != theirs:
            raise UserError(
                f"distillation.kind={config.kind!r} compares block by block, and model.teacher "
                f"{str(teacher.name_or_path)!r} has {key}={theirs}, the student {ours}. "
                "Choose a teacher of the student's shape, or distillation.kind: kl."
            )


def use_eager_attention(
    config: DistillationConfig | None, student: PreTrainedModel, teacher: PreTrainedModel, report: bool = True
) -> None:
    """Make both models return attention maps if the loss needs them: in transformers only eager attention does.

    Args:
        report: warn if the attention of a model is changed.

    Raises:
        UserError: a model returns no attention maps.
    """
    if config is None or not needs_attention(config):
        return
    before = sorted({str(model.config._attn_implementation) for model in (student, teacher)} - {"eager"})
    for owner, model in (("student", student), ("teacher", teacher)):
        model.set_attn_implementation("eager")
        if (reason := _missing_maps(model)) is not None:
            raise UserError(
                f"distillation.kind={config.kind!r} needs attention maps, and the {owner}, a "
                f"{type(model).__name__}, returns none: {reason}. "
                "Set distillation.attention_weight: 0, or distillation.kind: kl."
            )
    if before and report:
        logger.warning(
            f"distillation.kind={config.kind!r} compares attention maps: student and teacher run with eager attention "
            f"instead of {' and '.join(before)}, which takes more time and memory."
        )


@torch.no_grad()
def _missing_maps(model: PreTrainedModel) -> str | None:
    """Why a forward pass of two tokens returns no attention maps, or None if it does."""
    ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device=model.device)
    was_training = model.training
    model.eval()
    try:
        maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    except Exception as error:  # whatever a model without attention maps raises
        return one_line(error, end="open")
    finally:
        model.train(was_training)
        reshard(model)  # with `reshard_after_forward: false` its blocks stay gathered
    if not maps:
        return "its output has no attentions"
    shapes = [tuple(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__ for each in maps]
    wrong = [shape for shape in shapes if shape[-2:] != (_PROBE_TOKENS, _PROBE_TOKENS) or len(shape) != 4]
    return f"its attentions are {wrong[0]}, not [batch, heads, query, key]" if wrong else None
