"""What a run does to take less memory, chosen by its plan."""

from dataclasses import replace

from transformers import TrainingArguments

from ast_sparse.config import RunConfig
from ast_sparse.planning.budget import Budget
from ast_sparse.planning.plan import Hardware, Plan
from ast_sparse.planning.setup import Setup

_SETTING = "sparsity.fast_forward"


def needs_memory_plan(config: RunConfig, args: TrainingArguments) -> bool:
    """Whether a run that starts now has to plan its memory to choose."""
    is_chosen = args.gradient_checkpointing or args.torch_compile or config.sparsity.fast_forward != "auto"
    return args.device.type != "cpu" and not is_chosen


def choose_fast_forward(config: RunConfig, plan: Plan, setup: Setup, hardware: Hardware) -> tuple[bool, str]:
    """Whether training steps recompute norms, activations and gates, and the line that says why.

    Args:
        plan: with its memory model, where `auto` needs it.
        setup: of the run; its `fast_forward` is not read.
    """
    setting = config.sparsity.fast_forward
    if config.training.get("torch_compile") or config.training.get("torch_compile_backend"):
        return True, "fast_forward: off (torch.compile chooses what is recomputed)"
    if setting != "auto":
        return setting == "on", f"fast_forward: {setting} ({_SETTING})"
    if setup.on_cpu:
        return True, f"fast_forward: on ({_SETTING}=auto: on a CPU)"
    if setup.gradient_checkpointing:
        return False, f"fast_forward: off ({_SETTING}=auto: whole blocks are recomputed)"
    budget = None if plan.memory is None else Budget(plan, replace(setup, fast_forward=False), hardware)
    if budget is None or budget.memory is None:
        return False, f"fast_forward: off ({_SETTING}=auto: the memory of the run is unknown)"
    fits = budget.memory.total <= budget.limit
    shown = f"{budget.memory.total / 2**30:.1f} of {budget.limit / 2**30:.1f} GiB"
    why = f"the run fits without it, {shown}" if fits else f"without it the run needs {shown}"
    return not fits, f"fast_forward: {'off' if fits else 'on'} ({_SETTING}=auto: {why})"
