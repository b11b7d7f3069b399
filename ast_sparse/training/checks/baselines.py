"""Checks of the baselines IMP, GMP and late SLoRB before a run."""

from transformers import TrainingArguments

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.schedules import is_refresh_due, lacks_rounds, slorb_step, sparsity_at
from ast_sparse.sparsity.oneshot import METHODS


def check_baseline(sparsity: SparsityConfig, slorb: SLoRBConfig | None, args: TrainingArguments) -> None:
    """Refuse settings with which a run would not reach its pattern, as far as that is known without the data.

    Args:
        args: of training; the steps are checked only if `max_steps` is set.

    Raises:
        UserError: two settings do not go together.
    """
    if sparsity.is_gradual and args.load_best_model_at_end:
        raise UserError(
            f"training.load_best_model_at_end=True with sparsity.schedule={sparsity.schedule} would bring back a "
            "checkpoint of lower sparsity than the pattern. Remove one of them."
        )
    if sparsity.forward == "dense" and slorb is not None and slorb.enabled:
        raise UserError(
            "sparsity.forward=dense with slorb would count pruned weights twice: SLoRB stands in for them. Remove one."
        )
    if METHODS[sparsity.criterion].needs_text and args.torch_compile:
        raise UserError(
            f"training.torch_compile=True hides the inputs that sparsity.criterion={sparsity.criterion} looks at. "
            "Remove one of them."
        )
    if args.max_steps > 0:
        check_steps(sparsity, slorb, args.max_steps)


def check_steps(sparsity: SparsityConfig, slorb: SLoRBConfig | None, total_steps: int) -> None:
    """Raise UserError unless IMP's last round begins within the run, and the pattern is reached before SLoRB begins."""
    if lacks_rounds(sparsity, total_steps):
        given = "" if sparsity.steps_per_round is None else f" of sparsity.steps_per_round={sparsity.steps_per_round}"
        raise UserError(
            f"sparsity.rounds={sparsity.rounds}{given} need more than the {total_steps} steps of the run. Lower "
            f"{'it' if sparsity.steps_per_round is None else 'one of them'}, or raise training.max_steps."
        )
    begin = slorb_step(slorb, total_steps)
    if slorb is None or begin is None or not sparsity.is_gradual:
        return
    refreshed = next((step for step in range(begin, 0, -1) if is_refresh_due(sparsity, step, total_steps)), 0)
    if sparsity_at(sparsity, refreshed, total_steps) < sparsity.final_sparsity:
        raise UserError(
            f"slorb.start={slorb.start} begins SLoRB after {begin} steps, before sparsity.schedule={sparsity.schedule} "
            "has reached the pattern. Raise it, or let the schedule prune faster."
        )
