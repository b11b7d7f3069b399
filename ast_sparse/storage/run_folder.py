"""What a run of `ast-train` left in its folder: settings, figures by stage, the log, flip rates, continuations."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ast_sparse.config.yaml12 import read_yaml
from ast_sparse.errors import UserError
from ast_sparse.storage.files import read_json
from ast_sparse.training.callbacks.metrics import METRICS
from ast_sparse.training.callbacks.sparsity import MASK_HISTORY

RESULTS = "results.json"
RESOLVED_CONFIG = "config.yaml"
SAMPLES = "samples.json"
REPORT = "report"  # a folder
PROTOCOL = ("seq_len", "windows", "predicted_tokens", "total_tokens")  # what a perplexity of a stage says of its text


@dataclass(frozen=True, kw_only=True)
class Run:
    """The record of a run.

    Attributes:
        config: the resolved configuration, by section.
        stages: figures by stage (dense, one-shot N:M, retrained N:M) and data set.
        log: rows of metrics.jsonl, a `step` in each.
        history: rows of mask_history.jsonl.
        samples: continuations by stage and prompt.
    """

    folder: Path
    config: dict[str, Any]
    stages: dict[str, dict[str, dict[str, Any]]]
    log: list[dict[str, Any]]
    history: list[dict[str, Any]]
    samples: dict[str, dict[str, str]]

    def logged(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of each record of the log that has `key` and a finite value of it."""
        return [(row["step"], row[key]) for row in self.log if isinstance(row.get(key), int | float)]

    def logged_keys(self) -> list[str]:
        """Names of all figures of the log, in the order they first appear."""
        return list(dict.fromkeys(key for row in self.log for key in row))

    def setting(self, *path: str) -> Any:
        """A value of the configuration, None where it or a section on the way is missing."""
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
    stages = _read_figures(folder / RESULTS)
    for stage, results in stages.items():
        for name, figures in results.items():
            if not isinstance(figures, dict) or not all(isinstance(figures.get(key), int) for key in PROTOCOL):
                raise UserError(f"Cannot read `{folder / RESULTS}`: {stage}, {name!r:.60}. Restore the file.")
    return Run(
        folder=folder,
        config=read_yaml(folder / RESOLVED_CONFIG),
        stages=stages,
        log=_read_rows(folder / METRICS),
        history=_read_rows(folder / MASK_HISTORY),
        samples=_read_figures(folder / SAMPLES),
    )


def _read_figures(path: Path) -> dict[str, dict[str, Any]]:
    """An object of objects; empty where there is no such file."""
    if not path.exists():
        return {}
    content = read_json(path)
    for name, value in content.items():
        if not isinstance(value, dict):
            raise UserError(f"Cannot read `{path}`: {name!r:.60} holds no figures. Restore the file.")
    return content


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line that a kill cut is left out. Empty where there is no such file."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            row = json.loads(text)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("it holds no step")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: {error}. Restore the file, or remove the line.") from error
        rows.append(row)
    return rows
