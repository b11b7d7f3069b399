"""Distillation on hidden states and attention maps: TinyBERT, MobileBERT, SquareHead (paper Sec. 3.3, (7)-(14)).

They replace L_logit in (4): `L = ce_weight · CE + kl_weight · D`, with sums over the decoder blocks,

- tinybert: `D = soft CE (9)-(10) + attention_weight · Σ (7) + hidden_weight · Σ (8)`, no embedding distillation;
- mobilebert: `D = hidden_weight · Σ (8) + attention_weight · Σ (11)`, no logits of the teacher;
- squarehead: `D = T² · KL (13) + hidden_weight · Σ (12)`, added as (14).

This module has the terms of the blocks; `logits.py` has the rest. Each loss is a mean within a position, summed over
the counted positions (those whose shifted label is not −100), so that it can be divided by the tokens of a whole batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.kernels.waits import waits
from ast_sparse.sparsity.model import decoder_blocks

# the counted positions of a [batch, seq] tensor: the index of rows and columns, int64; on a GPU, which would wait for
# their number, a bool mask
Positions = tuple[Tensor, ...] | Tensor


@dataclass(frozen=True)
class Features:
    """Hidden states and attention maps of a model, one entry for each decoder block; empty if they are not needed.

    Attributes:
        hidden: `[batch, seq, hidden]`, the outputs of the blocks, before the final norm.
        attentions: `[batch, heads, query, key]`, attention probabilities.
    """

    hidden: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()


def needs_hidden(config: DistillationConfig | None) -> bool:
    """Whether the loss uses the outputs of the blocks."""
    kinds = ("tinybert", "mobilebert", "squarehead")
    return config is not None and config.kind in kinds and config.needs_teacher and config.hidden_weight > 0


def needs_attention(config: DistillationConfig | None) -> bool:
    """Whether the loss uses attention maps."""
    kinds = ("tinybert", "mobilebert")
    return config is not None and config.kind in kinds and config.needs_teacher and config.attention_weight > 0


def forward_with_features(
    call: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any], config: DistillationConfig | None
) -> tuple[Any, Features]:
    """Run `call(**inputs)` and record the features of `model` that the loss of `config` uses.

    Args:
        call: the model, a wrapper of it (DDP), or only its decoder.
        model: causal LM with the blocks; its attention must be eager if maps are needed.
        inputs: arguments of `call`.

    Returns:
        The result of `call`, and the features with their graph; no other reference to them remains.
    """
    if needs_attention(config):
        inputs = {**inputs, "output_attentions": True}
    if needs_hidden(config):
        with recorded_blocks(model) as hidden:
            outputs = call(**inputs)
    else:
        hidden, outputs = [], call(**inputs)
    return outputs, Features(tuple(hidden), tuple(outputs.attentions) if needs_attention(config) else ())


@contextmanager
def recorded_blocks(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that is filled with the outputs `[batch, seq, hidden]` of the decoder blocks, in the order they run.

    They are the blocks' own outputs; in `output_hidden_states` the final norm is applied to the last one. Hooks exist
    only in the block, so that neither evaluation nor the recomputation of activation checkpointing records anything.

    Raises:
        UserError: the model has no list of decoder blocks.
    """
    outputs: list[Tensor] = []

    def record(block: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple | list) else output)

    handles = [block.register_forward_hook(record) for block in decoder_blocks(model).values()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def feature_loss(student: Features, teacher: Features, labels: Tensor, config: DistillationConfig) -> Tensor:
    """The part of D that uses features, with `hidden_weight` and `attention_weight`, without `kl_weight`.

    Args:
        student, teacher: as `forward_with_features` returns them for the same config.
        labels: `[batch, seq]` int64, already shifted; positions with −100 do not count.

    Returns:
        The sum over blocks and counted positions, a scalar in float32 or wider.

    Raises:
        ValueError: student and teacher differ in blocks or shapes.
    """
    positions = counted_positions(labels)
    hidden = relative_hidden_loss if config.kind == "squarehead" else hidden_loss
    attention = attention_kl if config.kind == "mobilebert" else attention_mse
    total = torch.zeros((), dtype=torch.float32, device=labels.device)
    for ours, theirs in zip(student.hidden, teacher.hidden, strict=True):
        total = total + config.hidden_weight * hidden(ours, theirs, positions)
    for ours, theirs in zip(student.attentions, teacher.attentions, strict=True):
        total = total + config.attention_weight * attention(ours, theirs, positions)
    return total


def counted_positions(labels: Tensor) -> Positions:
    """The positions whose shifted label `[batch, seq]` is not −100."""
    counted = labels != IGNORE_INDEX
    return counted if waits(labels.device) else counted.nonzero(as_tuple=True)


def hidden_loss(student: Tensor, teacher: Tensor, positions: Positions) -> Tensor:
    """Mean squared error of hidden states, with the identity as the projection (8), summed over the positions.

    Args:
        student, teacher: `[batch, seq, hidden]`, any float dtype; computed in float32 or wider.
        positions: as `counted_positions` returns them.

    Raises:
        ValueError: shapes differ.
    """
    ours, theirs = _counted(student, teacher, positions)
    return (ours - theirs).square().sum() / ours.shape[-1]


def relative_hidden_loss(student: Tensor, teacher: Tensor, positions: Positions) -> Tensor:
    """`MSE(f_t, f_s) / MSE(f_t, 0)` over all positions together (12), times their number.

    Arguments and errors as in `hidden_loss`. A ratio is not a sum over positions: for a batch that is cut into
    micro-batches it is the mean of their ratios.
    """
    ours, theirs = _counted(student, teacher, positions)
    size = theirs.square().sum().clamp(min=torch.finfo(theirs.dtype).tiny)
    count = positions.sum() if isinstance(positions, Tensor) else len(ours)
    return count * ((ours - theirs).square().sum() / size)


def attention_mse(student: Tensor, teacher: Tensor, positions: Positions) -> Tensor:
    """Mean squared error of attention maps over heads and keys (7), summed over the query positions.

    Args:
        student, teacher: `[batch, heads, query, key]`, softmax probabilities; computed in float32 or wider. Keys that
            the causal mask hides are included as zeros.
        positions: as `counted_positions` returns them, of the queries.

    Raises:
        ValueError: shapes differ.
    """
    ours, theirs = _counted(student.transpose(1, 2), teacher.transpose(1, 2), positions)
    return (ours - theirs).square().sum() / (student.shape[1] * student.shape[-1])


def attention_kl(student: Tensor, teacher: Tensor, positions: Positions) -> Tensor:
    """KL(teacher‖student) between the attention distributions, a mean over heads (11), summed over query positions.

    Arguments and errors as in `attention_mse`. Masked keys, with probability 0 on both sides, add nothing. If only the
    student's probability underflows, the smallest normal number is used for it.
    """
    ours, theirs = _counted(student.transpose(1, 2), teacher.transpose(1, 2), positions)
    log_ours = ours.clamp(min=torch.finfo(ours.dtype).tiny).log()
    return (torch.xlogy(theirs, theirs) - theirs * log_ours).sum() / student.shape[1]


def _counted(student: Tensor, teacher: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
    """Both features at the positions that count, `[count, ...]`; the teacher's without gradient.

    With a mask they are `[batch, seq, ...]`, and 0 elsewhere: there every loss of this module is 0.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"teacher features {tuple(teacher.shape)}, student {tuple(student.shape)}.")
    dtype = torch.promote_types(student.dtype, torch.float32)
    both = student, teacher.detach()
    if isinstance(positions, Tensor):
        mask = positions.view(*positions.shape, *[1] * (student.dim() - positions.dim()))
        ours, theirs = (torch.where(mask, each.to(dtype), 0) for each in both)
    else:
        ours, theirs = (each[positions].to(dtype) for each in both)
    return ours, theirs
