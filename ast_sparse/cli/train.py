"""ast-train: retrain a dense causal LM to N:M sparsity."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ast_sparse.cli.command import SharedCommand
from ast_sparse.config import SECTIONS, RunConfig
from ast_sparse.run.signals import PREEMPTED_EXIT, Preempted, preemption_signals


def _fields() -> str:
    """Every configuration key with its default and its help text."""
    lines = ["\b", "Configuration keys (YAML, or --set section.key=value):"]
    absent = {item.name for item in dataclasses.fields(RunConfig) if item.default is None}
    for section, cls in SECTIONS.items():
        if section in absent:
            lines.append(f"  {section}.*: off unless the configuration has this section; one key is enough.")
        for item in dataclasses.fields(cls):
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            shown = "required" if default is dataclasses.MISSING else f"default {_plain(default)}"
            lines.append(f"  {section}.{item.name} ({shown}): {item.metadata['help']}")
    lines.append("  training.*: any field of transformers.TrainingArguments; bf16: auto means on where it is fast.")
    return "\n".join(lines)


def _plain(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@click.command(cls=SharedCommand, epilog=_fields())
@click.option("--config", "config_path", required=True, metavar="FILE", help="YAML file with the run's settings.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Replace one setting; repeatable.")
@click.option(
    "--resume", is_flag=False, flag_value="", default=None, metavar="[CHECKPOINT]",
    help="Continue from the last complete checkpoint in the output folder, or from the given folder.",
)  # fmt: skip
@click.option(
    "--resume-if-started", is_flag=True,
    help="Start the run, or continue it from the last complete checkpoint if the output folder has it already; if it "
    "is finished there, say so and exit with 0. For jobs that may be put back in the queue.",
)  # fmt: skip
@click.option(
    "--find-lr", is_flag=False, flag_value="", default=None, metavar="[RATE,RATE,…]",
    help="Compare learning rates, by default 1/4 to 4 times training.learning_rate: a short run with each from the "
    "same start, with the schedule compressed to it, judged by held-out text. Writes find_lr.json alone; the run "
    "itself is not started.",
)  # fmt: skip
@click.option("--find-lr-steps", type=int, metavar="N", help="Steps of each of these short runs; default 10.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the output folder.")
@click.option(
    "--dry-run", is_flag=True,
    help="Print layers, tokens, FLOPs, hours and memory of a device and of its host, and stop; needs no weights, text "
    "or tokenizer. If the run does not fit, print settings that fit and exit with 2.",
)  # fmt: skip
@click.option("--world-size", type=int, metavar="N", help="Dry run: number of devices; default: that of the launcher.")
@click.option(
    "--device-memory", type=float, metavar="GIB",
    help="Dry run: memory of a device; default: that of this machine's GPU (with training.use_cpu, of the machine), "
    "otherwise 80.",
)  # fmt: skip
@click.option(
    "--peak-tflops",
    type=float,
    metavar="X",
    help="Dry run: peak TFLOP/s of a device; default: that of this machine's GPU, otherwise an H100's 989.",
)
@click.option("--mfu", type=float, metavar="SHARE", help="Dry run: share of the peak that is used; default 0.35.")
@click.option(
    "--gpus-per-node", type=int, metavar="N",
    help="Dry run: devices of a machine, whose host memory is planned; default: those of the launcher, otherwise 8.",
)  # fmt: skip
@click.option(
    "--written-for", type=int, metavar="N",
    help="Dry run: number of devices whose sequences per step are to be kept; default: that of the launcher, otherwise "
    "1 and a machine's.",
)  # fmt: skip
@click.option("--output-dir", metavar="FOLDER", help="Output folder of the run; overrides training.output_dir.")
def main(
    config_path: str,
    overrides: tuple[str, ...],
    resume: str | None,
    resume_if_started: bool,
    find_lr: str | None,
    find_lr_steps: int | None,
    overwrite: bool,
    dry_run: bool,
    output_dir: str | None,
    **hardware: float | None,
) -> None:
    """Retrain a dense causal LM to N:M sparsity (AST): masks change during training; the teacher is the dense model.

    Prints the perplexity of the dense, the one-shot and the retrained model, and saves an ordinary checkpoint whose
    pruned weights are zero. For several GPUs: torchrun --nproc_per_node N $(which ast-train) --config FILE.

    On SIGTERM or SIGUSR1 it finishes the step, saves checkpoint-N and exits with 75 (EX_TEMPFAIL, "try again"; nothing
    else exits with 75); continue with --resume. A second signal stops the run at once.
    """
    ways = {"--resume": resume is not None, "--resume-if-started": resume_if_started, "--overwrite": overwrite}
    if find_lr is not None:
        ways |= {"--find-lr": True, "--dry-run": dry_run}
    elif find_lr_steps is not None:
        raise click.UsageError("--find-lr-steps belongs to --find-lr. Add it, or remove it.")
    if len(given_ways := [name for name, is_given in ways.items() if is_given]) > 1:
        raise click.UsageError(f"{' and '.join(given_ways)} cannot be combined. Give one.")
    rates = _rates(find_lr)
    given = {name: value for name, value in hardware.items() if value is not None}
    if given and not dry_run:
        raise click.UsageError(f"--{next(iter(given)).replace('_', '-')} belongs to --dry-run. Add it, or remove it.")
    with preemption_signals() as signals, _exit_when_preempted():
        from ast_sparse.config import load_config
        from ast_sparse.distributed.ranks import errors_shared

        with errors_shared():  # a node may see another file than the others
            config = load_config(config_path, overrides)
        # these take seconds: --help and a faulty configuration do without them
        from ast_sparse.planning.plan import Hardware
        from ast_sparse.run.checks import IF_STARTED
        from ast_sparse.run.find_lr import STEPS, find_rate
        from ast_sparse.run.train import run_training

        if find_lr is not None:
            steps = STEPS if find_lr_steps is None else find_lr_steps
            find_rate(config, output_dir, rates, steps, echo=click.echo, signals=signals)
            return
        run_training(
            config,
            output_dir=output_dir,
            resume=IF_STARTED if resume_if_started else None if resume is None else (resume or True),
            overwrite=overwrite,
            dry_run=dry_run,
            echo=click.echo,
            signals=signals,
            hardware=Hardware(**given) if dry_run else None,  # type: ignore[arg-type]  # click has converted them to numbers
        )


def _rates(text: str | None) -> list[float] | None:
    """The learning rates of `--find-lr`; None for the default ones."""
    if not text:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(
            f"--find-lr {text!r} is no list of numbers. Write them as --find-lr 1e-4,2e-4."
        ) from None


@contextmanager
def _exit_when_preempted() -> Iterator[None]:
    """Exit with 75, after the one line, if a signal has stopped the run."""
    try:
        yield
    except Preempted as stop:
        from ast_sparse.progress import close_bars

        close_bars()
        if str(stop) and os.environ.get("RANK", "0") == "0":  # all processes get the signal
            click.echo(f"\n{stop}", err=True)  # not on the line of a progress bar
        raise SystemExit(PREEMPTED_EXIT) from None


if __name__ == "__main__":
    main()
