"""The end of a dry run: what the planned run costs, and whether it fits."""

from dataclasses import replace

from ast_sparse.config import RunConfig
from ast_sparse.errors import UserError, one_line
from ast_sparse.evaluation.perplexity import default_seq_len
from ast_sparse.planning.batch import batch_line
from ast_sparse.planning.budget import Budget
from ast_sparse.planning.plan import Hardware, Plan
from ast_sparse.planning.setup import Setup, Sharding
from ast_sparse.run.checks import CheckedRun
from ast_sparse.run.memory_choices import choose_fast_forward
from ast_sparse.storage.locate import load_tokenizer
from ast_sparse.storage.meta import has_config_alone
from ast_sparse.storage.origin import check_saving
from ast_sparse.training.fsdp import sharding_plugin


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


def fast_forward_here(run: CheckedRun) -> tuple[bool, str]:
    """What `choose_fast_forward` says of a run that starts now, on the devices that it has."""
    setup = replace(planned_setup(run, run.args.world_size), on_cpu=run.args.device.type == "cpu")
    return choose_fast_forward(run.config, run.plan, setup, Hardware())


def planned_setup(run: CheckedRun, devices: int) -> Setup:
    """What the run's settings mean for the memory of each of its devices."""
    config, args = run.config, run.args
    sharding: Sharding = "fsdp2" if sharding_plugin(args) is not None else "ddp" if devices > 1 else "none"
    evaluation = config.evaluation
    measured_by = ["evaluation.datasets=[]"] if evaluation.datasets else []
    measured_by += ["evaluation.report=false"] if evaluation.report else []
    window = evaluation.seq_len or default_seq_len(run.plan.model_config)
    return Setup.of(
        args,
        config.data.block_size,
        devices,
        sharding,
        measured_tokens=window if measured_by else 0,
        measured_by=tuple(measured_by),
        on_cpu=bool(config.training.get("use_cpu")),
        offload=config.optimizer.offload,
        moments=config.optimizer.moments,
        eager=config.sparsity.kernels == "eager",
    )


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
