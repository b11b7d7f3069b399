"""What a run of `ast-train` left in its folder: settings, results by stage, the log, flip rates, continuations."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ast_sparse.config.yaml12 import read_yaml
from ast_sparse.errors import UserError
from ast_sparse.storage.files import finite_or_none
from ast_sparse.storage.stage_results import Stages, read_objects, read_stages

RESOLVED_CONFIG = "config.yaml"
SAMPLES = "samples.json"
METRICS = "metrics.jsonl"  # every record of the log
MASK_HISTORY = "mask_history.jsonl"  # flip rates by layer
FOUND_RATES = "find_lr.json"  # of ast-train --find-lr, before the run
SHORT_RUNS = ".find_lr"  # a folder, while --find-lr works
REPLAY = "replay"  # a folder of batches
REPORT = "report"  # a folder
START = "start"  # a folder: what the run started from, if text decided it


@dataclass(frozen=True, kw_only=True)
class Run:
    """The record of a run.

    Attributes:
        config: the resolved configuration, by section.
        stages: results by stage and data set.
        log: rows of metrics.jsonl, a `step` in each.
        history: rows of mask_history.jsonl.
        samples: continuations by stage and prompt.
    """

    folder: Path
    config: dict[str, Any]
    stages: Stages
    log: list[dict[str, Any]]
    history: list[dict[str, Any]]
    samples: dict[str, dict[str, str]]

    def logged(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of each record of the log with a finite value of `key`."""
        return [(row["step"], row[key]) for row in self.log if isinstance(row.get(key), int | float)]

    def logged_keys(self) -> list[str]:
        """Names of all values of the log, in the order they first appear."""
        return list(dict.fromkeys(key for row in self.log for key in row))

    def setting(self, *path: str) -> Any:
        """A value of the configuration, None if it or a section on the way to it is missing."""
        value: Any = self.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def is_run(folder: Path) -> bool:
    """Whether a folder is the output of `ast-train`."""
    return (folder / RESOLVED_CONFIG).is_file() and (folder / METRICS).is_file()


def read_run(folder: Path) -> Run:
    """Read the record of a run, finished or not.

    Raises:
        UserError: names the file that is damaged.
    """
    return Run(
        folder=folder,
        config=read_yaml(folder / RESOLVED_CONFIG),
        stages=read_stages(folder),
        log=_read_rows(folder / METRICS),
        history=_read_rows(folder / MASK_HISTORY),
        samples=read_objects(folder / SAMPLES),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line cut off by a kill is left out. Empty if there is no such file."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            row = json.loads(text)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("it has no step")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: {error}. Restore the file, or remove the line.") from error
        rows.append(row)
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a JSON line, written out before this returns; what is not finite becomes null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({key: finite_or_none(value) for key, value in row.items()}) + "\n")


def keep_rows_until(path: Path, step: int, at_most: int | None = None) -> None:
    """Drop the rows after `step`, and a line cut off by a kill: the resumed run records them again.

    Args:
        at_most: keep only this many of the rows up to `step`.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(kept[:at_most]), encoding="utf-8")
