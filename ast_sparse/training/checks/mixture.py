"""Checks of a mixture of domains before a run."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ast_sparse.config import MixtureConfig
from ast_sparse.errors import UserError


def check_mixture(config: MixtureConfig, train: Mapping[str, Any], held_out: Any, args: TrainingArguments) -> None:
    """Check that the domains of a run have what their rule needs.

    Args:
        train: blocks by domain.
        held_out: the same for held-out text, if there is any.

    Raises:
        UserError: a domain lacks a block, share, target or held-out text, a share or target has no domain, or there is
            no evaluation.
    """
    config.check_names(train)
    for what, given in (("share", config.shares), ("target", config.targets)):
        if unknown := sorted((given or {}).keys() - train.keys()):
            raise UserError(f"data.domains: there is a {what} for {unknown[0]!r}, which is not a domain. Remove it.")
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
    """Raise UserError if shares change at evaluations, but there are none."""
    if config.type != "constant" and args.eval_strategy == IntervalStrategy.NO:
        raise UserError(
            f"data.update.type={config.type} changes shares at every evaluation, and training.eval_strategy is no. Set "
            "eval_strategy: steps and eval_steps."
        )
