"""What a run that starts now decides by the memory of its GPU: `sparsity.masked_weights: auto`."""

from dataclasses import replace

from transformers import TrainingArguments

from ast_sparse.config import RunConfig
from ast_sparse.planning.budget import Budget
from ast_sparse.planning.plan import Hardware, Plan
from ast_sparse.planning.setup import Setup


def is_left_to_memory(config: RunConfig, args: TrainingArguments) -> bool:
    """Whether something is decided by a memory plan, which takes seconds: on GPUs, where it makes a difference."""
    left = config.sparsity.masked_weights == "auto" and args.device.type == "cuda"
    return left and Setup.of_run(config, args, None, args.world_size).has_masked_weights


def decide_by_memory(config: RunConfig, args: TrainingArguments, plan: Plan) -> tuple[RunConfig, str | None]:
    """The configuration with `kept` or `made` for `sparsity.masked_weights: auto`, and a line that says which and why.

    Returns:
        The configuration itself, and None, if nothing is left to decide, or the model cannot be planned: then copies
        are kept.
    """
    if plan.memory is None or not is_left_to_memory(config, args):
        return config, None
    budget = Budget(plan, Setup.of_run(config, args, plan.model_config, args.world_size), Hardware())
    choice = budget.setup.masked_weights
    if choice is None or choice == "auto":
        return config, None
    sparsity = replace(config.sparsity, masked_weights=choice)
    return replace(config, sparsity=sparsity), budget.masked_weights
