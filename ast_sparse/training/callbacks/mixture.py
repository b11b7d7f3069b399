"""Shares of domains that follow their held-out losses during a run (paper Sec. 7), and their log."""

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import MixtureConfig
from ast_sparse.data.blocks.domains import Mixture, updated_shares

logger = logging.get_logger(__name__)


class MixtureCallback(TrainerCallback):
    """At every evaluation after a step, computes the shares from the next step on, and logs them.

    An evaluation before the first step of a run, or of a resumed one (`eval_on_start`), changes nothing, so a resumed
    run continues as if it had not been interrupted. The losses are those that Trainer reports, equal on all ranks.
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
            self.log(self.log_values(state.global_step - 1))
            control.should_log = due  # logging clears it, and the loss of this step would not be logged
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
        self.log(self.log_values(state.global_step))

    def _update(self, step: int, losses: list[float]) -> None:
        if not all(math.isfinite(loss) for loss in losses):
            logger.warning(
                f"Step {step}: a held-out loss is not finite, so the shares of the domains stay as they are."
            )
            return
        targets = [(self.config.targets or {})[name] for name in self.mixture.names]
        shares = updated_shares(self.mixture.shares_at(step), losses, targets, self.config)
        self.mixture.change_shares(step, shares, losses)

    def log_values(self, step: int) -> dict[str, float]:
        """Share of each domain at a step, and how many times its blocks were used before it."""
        shares, epochs = self.mixture.shares_at(step), self.mixture.used(step) / self.mixture.blocks
        return {
            **{f"domain_share/{name}": share for name, share in zip(self.mixture.names, shares, strict=True)},
            **{f"domain_epoch/{name}": float(part) for name, part in zip(self.mixture.names, epochs, strict=True)},
        }
