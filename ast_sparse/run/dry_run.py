"""The end of a dry run: what the planned run costs, and whether it fits."""

from dataclasses import replace

from ast_sparse.config import RunConfig
from ast_sparse.errors import UserError, one_line
from ast_sparse.planning.batch import batch_line
from ast_sparse.planning.budget import Budget
from ast_sparse.planning.plan import Hardware, Plan
from ast_sparse.planning.setup import Setup
from ast_sparse.run.checks import CheckedRun
from ast_sparse.run.memory_choices import choose_fast_forward
from ast_sparse.storage.locate import load_tokenizer
from ast_sparse.storage.meta import has_config_alone
from ast_sparse.storage.origin import check_saving


def show_costs(run: CheckedRun, hardware: Hardware) -> None:
    """Print the differences from the run that is resumed, and what the plan costs.

    Raises:
        UserError: the tokenizer cannot be saved, or a device has too little memory.
    """
    config, args = run.config, run.args
    if args.should_log and run.changed:
        run.echo("\n".join(run.changed))
    unread = _check_tokenizer(config, run.plan)
    if not args.should_log:
        return
    if unread is not None:
        run.echo(f"tokenizer: not looked at, a plan needs none ({unread})")
    devices = hardware.world_size or args.world_size
    run.echo(batch_line(args, devices, hardware))
    setup = planned_setup(run, devices)
    is_fast, line = choose_fast_forward(config, run.plan, setup, hardware)
    run.echo(line)
    budget = Budget(run.plan, replace(setup, fast_forward=is_fast), hardware)
    run.echo("\n".join(budget.lines()))
    budget.check()


def planned_setup(run: CheckedRun, devices: int) -> Setup:
    """What the run's settings mean for the memory of each of its devices."""
    return Setup.of_run(run.config, run.args, run.plan.model_config, devices)


def _check_tokenizer(config: RunConfig, plan: Plan) -> str | None:
    """Check that the tokenizer can be saved; why it cannot be read if that is so.

    Raises:
        UserError: it can be read and not saved.
    """
    model = config.model
    if has_config_alone(model):
        return None
    options = {key: getattr(model, key) for key in ("revision", "gguf_file", "trust_remote_code")}
    try:
        tokenizer = load_tokenizer(model.name_or_path, **options)
    except UserError as error:
        return one_line(error, end="open")
    check_saving(model.name_or_path, plan.model_config, tokenizer=tokenizer)
    return None
