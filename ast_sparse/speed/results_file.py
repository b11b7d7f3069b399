"""The JSON file of results: written after each case, and continued by a run with the same settings."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ast_sparse.errors import UserError, shown
from ast_sparse.speed.comparison import Comparison
from ast_sparse.speed.machine import surroundings
from ast_sparse.speed.outcomes import Outcome, bound
from ast_sparse.storage.files import read_json

_NAMES = {
    "model": "MODEL", "files": "MODEL (its files have changed)", "against_files": "--against (its files have changed)",
}  # fmt: skip


def record(comparison: Comparison, outcomes: Sequence[Outcome], machine: dict[str, Any]) -> dict[str, Any]:
    """All results, for JSON."""
    return {
        "settings": comparison.settings,
        "machine": machine,
        "notes": list(comparison.notes),
        "weights": {side: asdict(held) for side, held in comparison.weights.items()},
        "bound": bound(comparison.weights),
        "cases": [outcome.record() for outcome in outcomes],
    }


def read_results(path: Path, comparison: Comparison) -> tuple[list[Outcome], dict[str, Any]]:
    """The outcomes that an earlier run left in a file, and its machine; both empty if there is no file.

    Raises:
        UserError: the file holds something else, or results of other settings.
    """
    if not path.exists():
        return [], {}
    content, here = read_json(path), surroundings()
    try:
        settings, machine = dict(content["settings"]), dict(content["machine"])
        outcomes = [Outcome.of(each) for each in content["cases"]]
        before = {**settings, **{name: machine[name] for name in here}}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"--json {path} is not a file of ast-bench. Name another file.") from error
    now = {**comparison.settings, **here}
    if changed := [name for name in now if before.get(name) != now[name]]:
        name = changed[0]
        option = _NAMES.get(name, name if name in here else f"--{name.replace('_', '-')}")
        values = "" if name.endswith("files") else f"={shown(before.get(name))}, now {shown(now[name])}"
        raise _other_results(path, f"{option}{values}")
    return outcomes, machine


def check_gpu(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError if the results of a file are from another GPU, which is known once the model is loaded.

    Args:
        before, now: the machine of the file, as `read_results` gives it, and that of the first model's process.
    """
    names = [machine.get("gpu", "none") for machine in (before, now)]
    if before and names[0] != names[1]:
        raise _other_results(path, f"gpu={shown(names[0])}, now {shown(names[1])}")


def _other_results(path: Path, what: str) -> UserError:
    return UserError(f"--json {path} holds results with {what}. Name another file, or start anew with --overwrite.")
