"""Run the benchmarks of this folder, all or those named, each in its own process, and print one table.

The last column has the goals as thresholds: a goal is met if the 20th percentile of the ratio meets it.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from scripts.benchmarks.harness import Command, provenance, read_lines, table

HERE = Path(__file__).resolve().parent
OTHERS = ("harness", "run", "step_profile", "loading")  # loading has options of its own
BENCHMARKS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in OTHERS)


@click.command(cls=Command, help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(BENCHMARKS))
@click.option("--quick", is_flag=True, help="Tiny shapes, one pair: does everything run? No results without --out.")
@click.option("--reference", type=click.Path(exists=True, path_type=Path), help="Checkout of the public AST code.")
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Checkout of an earlier commit (traffic).")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Results as JSON lines; default results/DEVICE.jsonl.",
)
def main(names: tuple[str, ...], quick: bool, reference: Path | None, before: Path | None, out: Path | None) -> int:
    made_with = provenance()
    if out is None and not quick:
        out = HERE / "results" / f"{re.sub(r'[^A-Za-z0-9_]+', '-', made_with['device'])}.jsonl"
    results, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or BENCHMARKS:
            lines = Path(folder) / f"{name}.jsonl"
            command = [sys.executable, "-m", f"scripts.benchmarks.{name}", "--out", str(lines)]
            command += ["--quick"] if quick else []
            command += ["--reference", str(reference)] if reference is not None else []
            command += ["--before", str(before)] if before is not None else []
            click.echo(f"== {name}", err=True)
            if subprocess.run(command, stdout=subprocess.DEVNULL).returncode or not lines.exists():
                failed.append(name)
            if not lines.exists():
                continue
            results += read_lines(lines)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a", encoding="utf-8") as file:
                    file.write(lines.read_text(encoding="utf-8"))
    click.echo(f"{made_with['device']}, commit {made_with['commit']}, {made_with['versions']}")
    click.echo(table(results))
    if failed:
        click.echo(f"Error: failed: {', '.join(failed)}", err=True)
    return 1 if failed else 0


if __name__ == "__main__":
    main()
