"""The loss of a micro-batch, from hidden states and heads, or from full logits if a head is not understood."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import DistillationConfig
from ast_sparse.data.blocks.collator import DOMAIN
from ast_sparse.distillation.chunked import chunked_distillation_loss
from ast_sparse.distillation.features import Features, feature_loss, forward_with_features
from ast_sparse.distillation.head import (
    OutputHead,
    UnknownHeadError,
    find_output_head,
    hidden_states,
    loss_for_logits,
)
from ast_sparse.distillation.logits import IGNORE_INDEX, distillation_loss
from ast_sparse.distributed.ranks import mean_over_ranks
from ast_sparse.errors import UserError
from ast_sparse.storage.model_kind import without_cache
from ast_sparse.training.fsdp import sharding_plugin

logger = logging.get_logger(__name__)


def split_batch(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The inputs of the model, and the shifted labels: shifting labels is cheaper than shifting the large logits.

    Raises:
        UserError: there are no labels.
    """
    if inputs.get("labels") is None:
        raise UserError("A batch has no labels. Use the default data_collator, or let yours add `labels`.")
    labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    features = {key: value for key, value in inputs.items() if key not in ("labels", DOMAIN)}
    if "position_ids" in features:
        features["use_cache"] = False  # with a cache, transformers does not see document borders in them
    return features, labels


def find_heads(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    config: DistillationConfig | None,
    args: TrainingArguments,
) -> dict[str, OutputHead]:
    """The heads of `student` and, if the loss needs its logits, of `teacher`; a warning names unknown ones.

    Each of these models runs two tokens.
    """
    models = {"student": student}
    if teacher is not None and teaches_logits(config):
        models["teacher"] = teacher
    heads = {}
    for owner, model in models.items():
        try:
            if args.torch_compile and sharding_plugin(args) is not None:
                raise UnknownHeadError("training.torch_compile hides it in a sharded run")
            heads[owner] = find_output_head(model)
        except UnknownHeadError as reason:
            if args.should_log:
                logger.warning(
                    "The loss needs full logits, which take memory for [tokens, vocabulary]. The reason is the "
                    f"{owner}, a {type(model).__name__}: {reason}."
                )
    return heads


def teaches_logits(config: DistillationConfig | None) -> bool:
    """Whether the loss looks at the logits of the teacher."""
    return config is not None and config.needs_teacher and config.kind != "mobilebert"


class MicroBatchLoss:
    """The loss (4) of student and teacher, summed over the tokens of a micro-batch; cross-entropy alone in evaluation.

    If the heads of both are known, no full logits are made: see `chunked_distillation_loss`.

    Args:
        teacher: frozen and in eval mode; None if D has no weight.
        config: the loss; None is cross-entropy.
        heads: as `find_heads` returns them.
    """

    def __init__(
        self, teacher: PreTrainedModel | None, config: DistillationConfig | None, heads: dict[str, OutputHead]
    ) -> None:
        self.teacher = teacher
        self.config = config
        self.heads = heads

    def __call__(
        self,
        model: nn.Module,
        student: PreTrainedModel,
        inputs: Mapping[str, Any],
        labels: Tensor,
        needs_logits: bool,
        by_position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """The summed loss, its number of tokens, and the output of the student.

        Args:
            model: the student as it is called, in the wrapper of a distributed run.
            student: the same without the wrapper.
            labels: `[batch, seq]` int64, already shifted.
            needs_logits: the outputs must have logits; otherwise they may be None.
            by_position: `[batch · seq]` of zeros, filled with the loss of each position, without features.
        """
        config = self.config if model.training else None
        inside = config if self.teacher is not None else None  # what the loss needs from inside the models
        ours, theirs = self._usable_heads(student, config, needs_logits)
        reference, teacher_features = self._reference(inputs, inside, theirs)
        if ours is None:
            outputs, features = forward_with_features(model, student, inputs, inside)
            loss, tokens = distillation_loss(outputs.logits, reference, labels, config, by_position=by_position)
        else:
            head = ours

            def loss_of(hidden: Tensor) -> tuple[Tensor, Tensor]:
                return chunked_distillation_loss(
                    hidden, head, reference, theirs, labels, config, by_position=by_position
                )

            with loss_for_logits(student, head, loss_of) as counts:
                outputs, features = forward_with_features(model, student, inputs, inside)
            loss, tokens = outputs.loss, counts[0]
        if config is not None and (teacher_features.hidden or teacher_features.attentions):
            loss = loss + config.weights[1] * feature_loss(features, teacher_features, labels, config)
        return loss, tokens, outputs

    def _usable_heads(
        self, student: PreTrainedModel, config: DistillationConfig | None, needs_logits: bool
    ) -> tuple[OutputHead | None, OutputHead | None]:
        """The heads of student and teacher, or None for both if full logits are needed."""
        ours, theirs = self.heads.get("student"), self.heads.get("teacher")
        if needs_logits or ours is None or not ours.belongs_to(student):
            return None, None
        if self.teacher is None or not teaches_logits(config):
            return ours, None
        return (ours, theirs) if theirs is not None and theirs.belongs_to(self.teacher) else (None, None)

    @torch.no_grad()
    def _reference(
        self, inputs: Mapping[str, Any], config: DistillationConfig | None, head: OutputHead | None
    ) -> tuple[Tensor | None, Features]:
        """The input of the teacher's head, or its logits if `head` is None, and the features that `config` asks for."""
        if config is None or self.teacher is None:
            return None, Features()
        teacher, inputs = self.teacher, {**inputs, **without_cache(self.teacher)}
        if not teaches_logits(config):
            return None, forward_with_features(teacher.base_model, teacher, inputs, config)[1]
        if head is None:
            outputs, features = forward_with_features(teacher, teacher, inputs, config)
            return outputs.logits, features
        with hidden_states(head) as captured:
            _, features = forward_with_features(teacher, teacher, inputs, config)
        return captured[0], features


class DomainLosses:
    """The training loss (4) by domain, without features, over the tokens since the last log record.

    A row whose loss is not finite is left out, tokens and all: the step may be skipped (`watch.nan`).

    Args:
        names: the domains, in the order of `DomainBlocks`.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self._sums: Tensor | None = None  # loss and tokens by domain

    def add(self, domains: Tensor, by_position: Tensor, labels: Tensor) -> None:
        """Add a micro-batch.

        Args:
            domains: int64 `[batch]`.
            by_position: float32 `[batch · seq]`.
            labels: `[batch, seq]`, shifted; −100 does not count.
        """
        counts = (labels != IGNORE_INDEX).sum(-1)
        losses = by_position.view_as(labels).sum(-1)
        rows = torch.where(losses.isfinite(), torch.stack([losses, counts.float()]), 0.0)
        if self._sums is None:
            self._sums = rows.new_zeros(2, len(self.names))
        self._sums.index_add_(1, domains.to(rows.device), rows)

    def log_values(self) -> dict[str, float]:
        """`domain_loss/NAME` of the domains that had tokens since the last call; all ranks must call it."""
        if self._sums is None:
            return {}
        losses, tokens = mean_over_ranks(self._sums).tolist()
        self._sums = None
        rows = zip(self.names, losses, tokens, strict=True)
        return {f"domain_loss/{name}": loss / count for name, loss, count in rows if count}
