"""Run a list of variants of one configuration, and make one table and the figures out of them.

usage: python scripts/study.py STUDY.yaml --out OUT [--smoke] [--set section.key=value] [--only NAME] [--row NAME=MODEL]

A study is a YAML file: `title`, `config` (the base configuration, relative to the study), `set` (for all variants),
`smoke` (on top of it with --smoke), `figures`, and `variants`: by name, the settings that differ from the base.
`run: prune` makes a variant one-shot (`ast-prune`), `run: eval` with `model:` a row that is only measured.
Variants that are finished are not run again, and an interrupted one continues from its last checkpoint.
OUT gets `results.csv`, `provenance.json` and PNG figures.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from ast_sparse.errors import UserError
from ast_sparse.yaml12 import read_yaml

ROOT = Path(__file__).resolve().parents[1]
RECORD = "study.json"  # in the folder of a variant: what made it
KEYS = ("title", "config", "set", "smoke", "variants", "figures")


@dataclass(frozen=True)
class Variant:
    """One row of the table: a run of `kind` train, prune or eval, and the settings it is made with."""

    name: str
    kind: str
    settings: dict[str, Any]
    model: str | None = None

    @property
    def folder(self) -> str:
        """Its folder inside OUT."""
        return re.sub(r"[^\w.+=-]+", "_", self.name)


@dataclass(frozen=True)
class Study:
    """A study file, with the settings of the command line in it."""

    path: Path
    title: str
    config: Path
    variants: tuple[Variant, ...]
    figures: tuple[str, ...]


def read_study(path: Path, overrides: dict[str, Any], smoke: bool, rows: dict[str, str]) -> Study:
    """Read and check a study; `overrides` beat what the file says, `rows` are further models to measure.

    Raises:
        UserError: an unknown key, or no variant.
    """
    tree = read_yaml(path)
    for key in tree:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}. Known: {', '.join(KEYS)}.")
    if not isinstance(tree.get("variants"), dict) or not isinstance(tree.get("config"), str):
        raise UserError(f"{path}: `config` (a file) and `variants` (settings by name) are needed.")
    common = {**(tree.get("set") or {}), **((tree.get("smoke") or {}) if smoke else {})}
    variants = []
    for name, given in tree["variants"].items():
        own = dict(given or {})
        kind, model = own.pop("run", "train"), own.pop("model", None)
        if kind not in ("train", "prune", "eval"):
            raise UserError(f"{path}: variants.{name}.run={kind!r} is unknown. Use train, prune or eval.")
        variants.append(Variant(str(name), kind, {**common, **own, **overrides}, model))
    variants += [Variant(name, "eval", {**common, **overrides}, model) for name, model in rows.items()]
    config = (path.parent / tree["config"]).resolve()
    return Study(path, str(tree.get("title", path.stem)), config, tuple(variants), tuple(tree.get("figures") or ()))


def run_variant(study: Study, variant: Variant, out: Path) -> dict[str, Any]:
    """Run one variant, or take it as it is if it is finished; its record.

    Raises:
        UserError: the folder holds the variant made with other settings, or its command failed.
    """
    folder = out / variant.folder
    made_of = {"config": study.config.name, "run": variant.kind, "model": variant.model, "settings": variant.settings}
    record_file = folder.with_suffix(".json")
    if record_file.exists():
        record: dict[str, Any] = json.loads(record_file.read_text(encoding="utf-8"))
        if record["made_of"] != made_of:
            raise UserError(
                f"{folder} was made with other settings. Remove {record_file} and the folder, or give another --out."
            )
        if record["finished"]:
            print(f"== {variant.name}: finished before", flush=True)
            return record
    else:
        record = {"name": variant.name, "made_of": made_of, "finished": False, "seconds": 0.0, **provenance()}
    out.mkdir(parents=True, exist_ok=True)
    _write(record_file, record)
    started = time.monotonic()
    try:
        for command in commands(study, variant, folder):
            print(f"== {variant.name}: {' '.join(command)}", flush=True)
            code = subprocess.run([sys.executable, "-m", *command]).returncode
            if code:
                raise UserError(f"{variant.name}: {command[0]} ended with exit code {code}. The study stops here.")
    finally:
        record["seconds"] += time.monotonic() - started
        _write(record_file, record)
    for checkpoint in folder.glob("checkpoint-*"):  # gigabytes that only a resume needs
        shutil.rmtree(checkpoint)
    record["finished"] = True
    _write(record_file, record)
    return record


def commands(study: Study, variant: Variant, folder: Path) -> list[list[str]]:
    """The `ast-…` commands of a variant, as modules and their arguments."""
    values = [
        argument for key, value in variant.settings.items() for argument in ("--set", f"{key}={json.dumps(value)}")
    ]
    resume = ["--resume"] if (folder / "config.yaml").exists() else []
    return [["ast_sparse.cli.train", "--config", str(study.config), *values, "--output-dir", str(folder), *resume]]


def provenance() -> dict[str, Any]:
    """What a figure depends on beside its settings: commit, device, versions."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "commit": commit + ("+changes" if changed else ""),
        "device": f"{device}, {os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's YAML file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, the table and the figures")
    parser.add_argument("--smoke", action="store_true", help="the study's small setting: minutes on two CPU cores")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of all variants"
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run only these variants")
    parser.add_argument("--row", action="append", default=[], metavar="NAME=MODEL", help="a further model to measure")
    options = parser.parse_args()
    overrides = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in options.overrides)}
    rows = dict(text.split("=", 1) for text in options.row)
    try:
        study = read_study(options.study, overrides, options.smoke, rows)
        for variant in study.variants:
            if not options.only or variant.name in options.only:
                run_variant(study, variant, options.out)
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
