"""`results.json` of a run: what was measured at each stage, as it is written, read and shown."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from ast_sparse.errors import UserError
from ast_sparse.storage.files import finite_or_none, read_json, write_json

RESULTS = "results.json"
WITHOUT_SLORB = " without SLoRB"  # after the name of a stage
PROTOCOL = ("seq_len", "windows", "predicted_tokens", "total_tokens")  # what a stage's result says about its text


class StageResult(TypedDict):
    """A perplexity of a stage and what it was measured on, as `PerplexityResult`; None for what is not finite."""

    perplexity: float | None
    mean_nll: NotRequired[float | None]
    seq_len: int
    windows: int
    predicted_tokens: int
    total_tokens: int
    seconds: NotRequired[float]
    join: NotRequired[str | None]
    bos: NotRequired[str | None]
    bad_window: NotRequired[int | None]


# By stage (dense, one-shot N:M, retrained N:M, and with SLoRB the last also without it) and data set.
Stages = dict[str, dict[str, StageResult]]


def is_result(stage: str) -> bool:
    """Whether a stage is the model that the run saved."""
    return stage.startswith("retrained") and not stage.endswith(WITHOUT_SLORB)


def write_stages(folder: Path, stages: Stages) -> None:
    """Write the results of all stages; JSON has no NaN and no infinity, so they become null."""
    content = {
        stage: {name: {key: finite_or_none(value) for key, value in result.items()} for name, result in results.items()}
        for stage, results in stages.items()
    }
    write_json(folder / RESULTS, content)


def read_stages(folder: Path) -> Stages:
    """What `write_stages` wrote; empty if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    stages = read_objects(folder / RESULTS)
    for stage, results in stages.items():
        for name, result in results.items():
            if not isinstance(result, dict) or not all(isinstance(result.get(key), int) for key in PROTOCOL):
                raise UserError(f"Cannot read `{folder / RESULTS}`: {stage}, {name!r:.60}. Restore the file.")
    return cast(Stages, stages)


def read_objects(path: Path) -> dict[str, dict[str, Any]]:
    """An object of objects; empty if there is no such file."""
    if not path.exists():
        return {}
    content = read_json(path)
    for name, value in content.items():
        if not isinstance(value, dict):
            raise UserError(f"Cannot read `{path}`: {name!r:.60} holds no results. Restore the file.")
    return content
