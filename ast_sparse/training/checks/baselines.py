"""What is refused of the baselines IMP, GMP and late SLoRB."""

from transformers import TrainingArguments

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.schedules import is_refresh_due, slorb_step, sparsity_at


def check_baseline(sparsity: SparsityConfig, slorb: SLoRBConfig | None, args: TrainingArguments) -> None:
    """Refuse what would end a run short of its pattern, as far as it is known before the data is.

    Args:
        args: those of training; `max_steps` counts where it is set.

    Raises:
        UserError: naming the settings that do not go together.
    """
    if sparsity.schedule != "constant" and args.load_best_model_at_end:
        raise UserError(
            f"training.load_best_model_at_end=True with sparsity.schedule={sparsity.schedule} would bring back a "
            "checkpoint of lower sparsity than the pattern. Remove one of them."
        )
    if sparsity.criterion != "magnitude" and args.torch_compile:
        raise UserError(
            f"training.torch_compile=True hides the inputs that sparsity.criterion={sparsity.criterion} looks at. "
            "Remove one of them."
        )
    if args.max_steps > 0:
        check_steps(sparsity, slorb, args.max_steps)


def check_steps(sparsity: SparsityConfig, slorb: SLoRBConfig | None, total_steps: int) -> None:
    """Raise UserError unless IMP's last round begins within the run, and the pattern is there when SLoRB begins."""
    final = sparsity.final_sparsity
    if sparsity.schedule == "imp" and sparsity_at(sparsity, total_steps - 1, total_steps) < final:
        given = "" if sparsity.steps_per_round is None else f" of sparsity.steps_per_round={sparsity.steps_per_round}"
        raise UserError(
            f"sparsity.rounds={sparsity.rounds}{given} need more than the {total_steps} steps of the run. Lower "
            f"{'it' if sparsity.steps_per_round is None else 'one of them'}, or raise training.max_steps."
        )
    begin = slorb_step(slorb, total_steps)
    if slorb is None or begin is None or sparsity.schedule == "constant":
        return
    refreshed = next((step for step in range(begin, 0, -1) if is_refresh_due(sparsity, step, total_steps)), 0)
    if sparsity_at(sparsity, refreshed, total_steps) < final:
        raise UserError(
            f"slorb.start={slorb.start} begins SLoRB after {begin} steps, before sparsity.schedule={sparsity.schedule} "
            "has reached the pattern. Raise it, or let the schedule prune faster."
        )
