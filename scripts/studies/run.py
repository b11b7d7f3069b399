"""Run a list of variants of one configuration, and make one table and figures of them."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ast_sparse.cli.command import Command
from ast_sparse.config.yaml12 import parse_yaml
from ast_sparse.errors import UserError
from ast_sparse.storage.files import read_json, write_json
from ast_sparse.tables import format_table
from scripts.provenance import provenance
from scripts.studies.curves import write_curves
from scripts.studies.results import read_outcomes, results_table, write_results
from scripts.studies.variants import Study, Variant, commands, read_study

ROOT = Path(__file__).resolve().parents[2]


class VariantError(UserError):
    """A command of a variant failed and printed why; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@click.command(cls=Command)
@click.argument("study_file", metavar="STUDY.yaml", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the runs, the table and the figures.")
@click.option("--smoke", is_flag=True, help="Use the study's small settings: minutes on two CPU cores.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE",
    help="For all variants, but a key of a section that a variant leaves out (distillation: null) does not reach it; "
    "repeatable.",
)  # fmt: skip
@click.option("--only", multiple=True, metavar="NAME", help="Run only this variant; repeatable.")
@click.option(
    "--row",
    "rows",
    multiple=True,
    metavar="NAME=MODEL",
    help="A further model to measure, for example a smaller dense one.",
)
@click.option("--list", "list_only", is_flag=True, help="Print the variants and their settings, and stop.")
def main(
    study_file: Path,
    out: Path | None,
    smoke: bool,
    overrides: tuple[str, ...],
    only: tuple[str, ...],
    rows: tuple[str, ...],
    list_only: bool,
) -> None:
    """Run the variants of STUDY.yaml and make one table and figures of them.

    A study has `title`, `config` (the base configuration, relative to the study), `set` (settings of all variants),
    `smoke` (further settings with --smoke), `seeds` (run each variant with each), `figures` (perplexity, flips, losses,
    alpha, curves), and `variants`: by name, the settings that differ. With `run: prune` a variant is pruned one-shot
    (ast-prune with sparsity.init, sparsity.pattern, calibration, basis and slorb.k); with `run: eval` and `model:` a
    model is only measured.

    Finished variants are not run again, and an interrupted one continues from its last checkpoint. OUT gets a folder
    and a record for each, results.csv, provenance.json and the figures as PNG; with evaluation.steps also curves.csv.
    """
    study = read_study(study_file, dict(_override(text) for text in overrides), smoke, _rows(rows))
    chosen = _chosen(study, only)
    if list_only:
        click.echo(listing(study))
        return
    if out is None:
        raise UserError("--out is missing. Name a folder for the runs, the table and the figures.")
    if study.figures and find_spec("matplotlib") is None:
        raise UserError("The figures need matplotlib. Install it: pip install 'ast-sparse[plots]'.")
    for variant in study.variants:  # before the first one takes hours
        find_record(study, variant, out)
    failure = None
    try:
        for number, variant in enumerate(chosen, start=1):
            click.echo(f"== variant {number} of {len(chosen)}: {variant.label}")
            run_variant(study, variant, out)
    except VariantError as error:
        failure = error
    given = [("--set", overrides), ("--only", only), ("--row", rows)]
    repeated = [argument for option, values in given for value in values for argument in (option, value)]
    report(study, out, [str(study_file), "--out", str(out), *(["--smoke"] if smoke else []), *repeated])
    if failure is not None:
        click.echo(f"Error: {failure}", err=True)
        sys.exit(failure.code)


def listing(study: Study) -> str:
    """The variants and their settings, as text."""
    common = dict(study.variants[0].settings)
    for variant in study.variants:
        common = {key: value for key, value in common.items() if key in variant.settings}
        common = {key: value for key, value in common.items() if variant.settings[key] == value}
    lines = []
    for variant in study.variants:
        own = {key: value for key, value in variant.settings.items() if key not in common}
        shown = [f"model={variant.model}"] if variant.model else []
        shown += [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in own.items()]
        lines.append((variant.label, variant.kind, "  ".join(shown) or "-"))
    shared = [f"  {key}={json.dumps(value, ensure_ascii=False)}" for key, value in common.items()]
    head = [study.title, f"base configuration: {study.config}"]
    return (
        "\n".join([*head, *(["of all variants:", *shared] if shared else []), ""])
        + "\n"
        + format_table(("variant", "run", "settings"), lines)
    )


def run_variant(study: Study, variant: Variant, out: Path) -> None:
    """Run one variant, unless it is finished.

    Raises:
        UserError: the folder holds the variant made with other settings, or other files.
        VariantError: its command failed.
    """
    folder, file = out / variant.folder, record_file(variant, out)
    record = find_record(study, variant, out)
    if record is not None and record["finished"]:
        click.echo("finished before")
        return
    record = _continued(record) if record is not None else _new_record(study, variant)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(file, record)
        if variant.kind != "train":  # made from scratch
            shutil.rmtree(folder, ignore_errors=True)
        if variant.kind == "eval":
            folder.mkdir()
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to: {error.strerror or error}. Give another folder.") from None
    with _timed(record, file, folder):
        for command in commands(study, variant, folder):
            _run(variant, command)
    for checkpoint in folder.glob("checkpoint-*"):  # gigabytes that only a resume needs
        if re.fullmatch(r"checkpoint-\d+", checkpoint.name):
            shutil.rmtree(checkpoint)
    write_json(file, {**record, "finished": True})


def report(study: Study, out: Path, arguments: list[str]) -> None:
    """Write the table and the figures of what is finished, and print the table; `arguments` are the command's."""
    finished = []
    for variant in study.variants:
        record = find_record(study, variant, out)
        if record is not None and record["finished"]:
            finished.append((variant, record, out / variant.folder))
    outcomes = read_outcomes(finished)
    if not outcomes:
        return
    write_results(study, outcomes, out, {"root": ROOT, "arguments": arguments, **provenance()})
    write_curves(outcomes, out / "curves.csv")
    if study.figures:
        from scripts.studies.figures import draw  # matplotlib is slow to import

        for name in study.figures:
            if not draw(name, outcomes, out / f"{name}.png"):
                click.echo(f"{name}.png is left out: no finished variant has results for it.")
    click.echo(f"\n{study.title}: {len(outcomes)} of {len(study.variants)} variants, perplexity (windows x tokens)")
    click.echo(results_table(outcomes))
    click.echo(f"Wrote results.csv, provenance.json and the figures to {out}")


def record_file(variant: Variant, out: Path) -> Path:
    """The file that records what a variant was made with, beside its folder."""
    return out / f"{variant.folder}.json"


def find_record(study: Study, variant: Variant, out: Path) -> dict[str, Any] | None:
    """The record of a variant that was started; None if it was not.

    Raises:
        UserError: it was made with other settings, or its folder holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Name a folder.")
    folder, file = out / variant.folder, record_file(variant, out)
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{folder} is not part of this study: {file.name} is missing. Remove it, or give another --out."
            )
        return None
    record = read_json(file)
    if not {"made_of", "finished", "seconds"} <= record.keys():
        raise UserError(f"{file} is not a record of a variant. Remove it, or give another --out.")
    now, before = _flat(_made_of(study, variant)), _flat(record["made_of"])
    resolved, stored = _flat(_resolved(variant)), _flat(record.get("resolved", {}))
    # only the resolved settings that both have: one that a later version added is not a difference
    for key in [*sorted(now.keys() | before.keys()), *sorted(resolved.keys() & stored.keys())]:
        was, value = {**stored, **before}.get(key), {**resolved, **now}.get(key)
        if was != value or (key in now) != (key in before):
            raise UserError(
                f"{folder} was made with other settings: {key.removeprefix('settings.')} was {_shown(was)}, and is "
                f"{_shown(value)}. Remove the folder and {file.name}, or give another --out."
            )
    return record


def _made_of(study: Study, variant: Variant) -> dict[str, Any]:
    made_of = {"config": study.config.name, "run": variant.kind, "model": variant.model, "settings": variant.settings}
    return dict(json.loads(json.dumps(made_of)))  # as it comes back from the record


def _resolved(variant: Variant) -> dict[str, Any]:
    return dict(json.loads(json.dumps(variant.config.to_dict())))


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return flat


def _new_record(study: Study, variant: Variant) -> dict[str, Any]:
    return {
        "name": variant.name, "made_of": _made_of(study, variant), "finished": False, "starts": 1, "seconds": 0.0,
        **provenance(), "resolved": _resolved(variant),
    }  # fmt: skip


def _continued(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a variant that is started again; it names every commit and device it ran on."""
    now = provenance()
    joined = {
        key: record[key] if now[key] in record[key].split("; ") else f"{record[key]}; {now[key]}"
        for key in ("commit", "device")
    }
    return {**record, **joined, "versions": now["versions"], "starts": record.get("starts", 1) + 1}


@contextlib.contextmanager
def _timed(record: dict[str, Any], file: Path, folder: Path) -> Iterator[None]:
    """Add the time to the record, also after a failure; if that left no files, the record is removed too."""
    started = time.monotonic()
    try:
        yield
    except BaseException:
        record["seconds"] += time.monotonic() - started
        write_json(file, record)
        if not folder.is_dir() or not any(folder.iterdir()):
            file.unlink()
            with contextlib.suppress(OSError):
                folder.rmdir()
            with contextlib.suppress(OSError):  # other variants are in it
                file.parent.rmdir()
        raise
    record["seconds"] += time.monotonic() - started
    write_json(file, record)


def _run(variant: Variant, command: list[str]) -> None:
    """Run one command with the code of this checkout, in a separate process, whose memory is freed at its end."""
    click.echo(shlex.join(["python", "-m", *command]))
    sys.stdout.flush()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    code = subprocess.run([sys.executable, "-m", *command], env=environment).returncode
    if code:
        name = command[0].replace("ast_sparse.cli.", "ast-")
        how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
        raise VariantError(
            f"{variant.label}: {name} {how}, see above. The study stops here. Start it again to continue.",
            code if code > 0 else 128 - code,
        )


def _override(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise UserError(f"--set {text!r} is not of the form section.key=value.")
    return key.strip(), parse_yaml(value, f"--set {text!r}: the value")


def _rows(texts: tuple[str, ...]) -> dict[str, str]:
    rows: dict[str, str] = {}
    for text in texts:
        name, sign, model = text.partition("=")
        if not sign or not name.strip() or not model.strip():
            raise UserError(f"--row {text!r} is not of the form NAME=MODEL.")
        if name.strip() in rows:
            raise UserError(f"--row {text!r}: {name.strip()!r} is given twice. Keep one.")
        rows[name.strip()] = model.strip()
    return rows


def _chosen(study: Study, only: tuple[str, ...]) -> list[Variant]:
    known = list(dict.fromkeys(name for variant in study.variants for name in (variant.name, variant.label)))
    for name in only:
        if name not in known:
            raise UserError(f"--only {name!r} is not a variant of {study.path}. Known: {', '.join(known)}.")
    return [variant for variant in study.variants if not only or {variant.name, variant.label} & {*only}]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the run in progress is stopped too
    main()
