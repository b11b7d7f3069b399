"""What a run does to take less memory, decided by its plan: `sparsity.fast_forward`, `sparsity.masked_weights`, and
whether there is room for `sparsity.semi_structured: auto`."""

from dataclasses import replace

from transformers import TrainingArguments

from ast_sparse.config import RunConfig
from ast_sparse.distributed.ranks import gather
from ast_sparse.planning.budget import Budget
from ast_sparse.planning.plan import Hardware, Plan
from ast_sparse.planning.setup import Setup

_SETTING = "sparsity.fast_forward"


def needs_memory_plan(config: RunConfig, args: TrainingArguments) -> bool:
    """Whether a run that starts now has to plan its memory to decide, which takes seconds: only on GPUs."""
    return _leaves_fast_forward(config, args) or _leaves_masked_weights(config, args)


def decide_by_memory(config: RunConfig, args: TrainingArguments, plan: Plan) -> tuple[RunConfig, tuple[str, ...]]:
    """The configuration of a run that starts now without what was left to its memory, and lines that say why.

    Without enough memory, semi-structured products are given up first, then copies of masked weights; if that is not
    enough, a step recomputes.

    Args:
        plan: with its memory model, if `needs_memory_plan`.
    """
    if plan.memory is None or not needs_memory_plan(config, args):
        return config, ()
    setup = Setup.of_run(config, args, plan.model_config, args.world_size)
    is_fast, line = choose_fast_forward(config, plan, setup, Hardware())
    sparsity, lines = config.sparsity, list[str]()
    if _leaves_fast_forward(config, args):
        sparsity = replace(sparsity, fast_forward="on" if is_fast else "off")
        lines.append(line)
    budget = Budget(plan, replace(setup, fast_forward=is_fast), Hardware())
    gives_up = setup.semi_structured == "auto" and budget.setup.semi_structured == "off"
    if sparsity.semi_structured == "auto" and any(gather(gives_up)):  # steps are timed by all processes or by none
        sparsity = replace(sparsity, semi_structured="off")
        lines += [] if gives_up else ["semi-structured products: off (another process has no memory for them)"]
    choice = budget.setup.masked_weights
    if _leaves_masked_weights(config, args) and choice in ("kept", "made") and budget.masked_weights is not None:
        sparsity = replace(sparsity, masked_weights=choice)
        lines.append(budget.masked_weights)
    return replace(config, sparsity=sparsity), tuple(lines)


def choose_fast_forward(config: RunConfig, plan: Plan, setup: Setup, hardware: Hardware) -> tuple[bool, str]:
    """Whether training steps recompute norms, activations and gates, and the line that says why.

    Args:
        plan: with its memory model, where `auto` needs it.
        setup: of the run; its `fast_forward` is not read.
    """
    setting = config.sparsity.fast_forward
    if config.training.get("torch_compile") or config.training.get("torch_compile_backend"):
        # the compiler recomputes such things too, so the plan counts them as recomputed
        return True, "fast_forward: off (torch.compile chooses what is recomputed)"
    if setting != "auto":
        return setting == "on", f"fast_forward: {setting} ({_SETTING})"
    if setup.on_cpu:
        return True, f"fast_forward: on ({_SETTING}=auto: faster on a CPU)"
    if setup.gradient_checkpointing:
        return False, f"fast_forward: off ({_SETTING}=auto: whole blocks are recomputed)"
    budget = None if plan.memory is None else Budget(plan, replace(setup, fast_forward=False), hardware)
    if budget is None or budget.memory is None:
        return False, f"fast_forward: off ({_SETTING}=auto: the memory of the run is unknown)"
    fits = budget.memory.total <= budget.limit
    needs, can = (f"{size / 2**30:.1f}" for size in (budget.memory.total, budget.limit))
    why = f"the run fits without recomputation, {needs} of {can} GiB"
    if not fits:
        why = f"without recomputation the run needs {needs} GiB, and {can} can be used"
    return not fits, f"fast_forward: {'off' if fits else 'on'} ({_SETTING}=auto: {why})"


def _leaves_fast_forward(config: RunConfig, args: TrainingArguments) -> bool:
    is_chosen = args.gradient_checkpointing or args.torch_compile or config.sparsity.fast_forward != "auto"
    return args.device.type == "cuda" and not is_chosen


def _leaves_masked_weights(config: RunConfig, args: TrainingArguments) -> bool:
    """Whether copies of masked weights, or their compressed form, are left to the memory."""
    sparsity = config.sparsity
    if args.device.type != "cuda" or (sparsity.masked_weights != "auto" and sparsity.semi_structured != "auto"):
        return False
    setup = Setup.of_run(config, args, None, args.world_size)
    may_go = setup.masked_weights == "auto" and not replace(setup, masked_weights="made").holds_masked_weights
    return setup.has_masked_weights and (may_go or (setup.keeps_masked_weights and setup.semi_structured == "auto"))
