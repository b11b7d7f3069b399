"""Shares of domains that follow their held-out losses while a run goes (paper Sec. 7), and what is logged of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ast_sparse.config import MixtureConfig
from ast_sparse.data.blocks.domains import Mixture, updated_shares
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.distributed.ranks import mean_over_ranks
from ast_sparse.errors import UserError

logger = logging.get_logger(__name__)


def check_mixture(config: MixtureConfig, train: Mapping[str, Any], held_out: Any, args: TrainingArguments) -> None:
    """Check that the domains of a run have what their rule needs.

    Args:
        train: blocks by domain.
        held_out: the same of the text that is held out, if there is any.

    Raises:
        UserError: a domain has no block, share, target or held-out text, there is one too many, or there is no
            evaluation.
    """
    config.check_names(train)
    for what, given in (("share", config.shares), ("target", config.targets)):
        if unknown := sorted((given or {}).keys() - train.keys()):
            raise UserError(f"data.domains: there is a {what} for {unknown[0]!r}, which is no domain. Remove it.")
    for name, blocks in train.items():
        if not len(blocks):
            raise UserError(f"data.domains.{name} has no block to train on. Give it more text, or remove it.")
    check_evaluations(config, args)
    if config.type == "constant":
        return
    if not isinstance(held_out, Mapping) or (lacking := train.keys() - held_out.keys()):
        name = "every domain" if not isinstance(held_out, Mapping) else sorted(lacking)[0]
        raise UserError(
            f"data.update.type={config.type} needs held-out text of {name}. Set data.eval_share, or pass eval_dataset "
            "as a mapping of domains."
        )


def check_evaluations(config: MixtureConfig, args: TrainingArguments) -> None:
    """Raise UserError if shares are to change at evaluations and there are none."""
    if config.type != "constant" and args.eval_strategy == IntervalStrategy.NO:
        raise UserError(
            f"data.update.type={config.type} changes shares at every evaluation, and training.eval_strategy is no. Set "
            "eval_strategy: steps and eval_steps."
        )


class MixtureCallback(TrainerCallback):
    """At every evaluation after a step, computes the shares that hold from the next step on, and logs them.

    An evaluation before the first step of a run, or of a resumed one (`eval_on_start`), changes nothing, so a resumed
    run goes on as if it had not been interrupted. The losses are those that Trainer reports, the same on all ranks.
    """

    def __init__(self, mixture: Mixture, config: MixtureConfig, log: Callable[[dict[str, float]], None]) -> None:
        self.mixture = mixture
        self.config = config
        self.log = log
        self._losses: dict[str, float] = {}
        self._steps_done = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps_done, self._losses = False, {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == 1:
            due = control.should_log
            self.log(self.figures(state.global_step - 1))
            control.should_log = due  # logging clears it, and the loss of this step would go unlogged
        self._steps_done, self._losses = True, {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._steps_done = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._steps_done:
            return
        for name in self.mixture.names:  # Trainer evaluates one domain after the other
            if (key := f"eval_{name}_loss") in kwargs["metrics"]:
                self._losses[name] = kwargs["metrics"][key]
        if len(self._losses) < len(self.mixture.names):
            return
        losses = [self._losses[name] for name in self.mixture.names]
        self._losses = {}
        if self.config.type != "constant":
            self._update(state.global_step, losses)
        self.log(self.figures(state.global_step))

    def _update(self, step: int, losses: list[float]) -> None:
        if not all(math.isfinite(loss) for loss in losses):
            logger.warning(
                f"Step {step}: a held-out loss is not finite, so the shares of the domains stay as they are."
            )
            return
        targets = [(self.config.targets or {})[name] for name in self.mixture.names]
        shares = updated_shares(self.mixture.shares_at(step), losses, targets, self.config)
        self.mixture.change_shares(step, shares, losses)

    def figures(self, step: int) -> dict[str, float]:
        """Share of each domain at a step, and how often its blocks have been gone through before it."""
        shares, epochs = self.mixture.shares_at(step), self.mixture.used(step) / self.mixture.blocks
        return {
            **{f"domain_share/{name}": share for name, share in zip(self.mixture.names, shares, strict=True)},
            **{f"domain_epoch/{name}": float(part) for name, part in zip(self.mixture.names, epochs, strict=True)},
        }


class DomainLosses:
    """The loss (4) of the training by domain, features left out, over the tokens since the last record of the log.

    Args:
        names: of the domains, in the order of `DomainBlocks`.
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
        rows = torch.stack([by_position.view_as(labels).sum(-1), counts.float()])
        if self._sums is None:
            self._sums = rows.new_zeros(2, len(self.names))
        self._sums.index_add_(1, domains.to(rows.device), rows)

    def figures(self) -> dict[str, float]:
        """`domain_loss/NAME` of the domains that had tokens since the last call; all ranks must call it."""
        if self._sums is None:
            return {}
        losses, tokens = mean_over_ranks(self._sums).tolist()
        self._sums = None
        figures = zip(self.names, losses, tokens, strict=True)
        return {f"domain_loss/{name}": loss / count for name, loss, count in figures if count}


def mean_loss(metrics: Mapping[str, float], held_out: Mapping[str, Any], prefix: str) -> float | None:
    """The loss over the blocks of all domains, out of those of each; None where one is missing."""
    sizes = {name: len(part) for name, part in held_out.items()}
    losses = {name: metrics.get(f"{prefix}_{name}_loss") for name in sizes}
    if not all(isinstance(loss, float) for loss in losses.values()):
        return None
    return math.fsum(loss * sizes[name] for name, loss in losses.items() if loss is not None) / sum(sizes.values())
