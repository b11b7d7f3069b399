"""Perplexity against tokens and against time, for training runs that measured it on the way: curves.csv."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ast_sparse.run.stages import logged_key
from scripts.studies.results import Outcome, perplexity_of, short_name

COLUMNS = ("variant", "seed", "dataset", "step", "tokens", "seconds", "perplexity")


def write_curves(outcomes: Sequence[Outcome], path: Path) -> bool:
    """Write curves.csv; if no run measured its perplexity during training, leave no file and return False."""
    rows = curve_rows(outcomes)
    if not rows:
        path.unlink(missing_ok=True)
        return False
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "dataset": short_name(row["dataset"])} for row in rows)
    return True


def curve_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row for each measurement: `COLUMNS`, in the order of the runs, then data sets, then steps.

    Step 0 is the one-shot model, the last step the finished one. `tokens` are those trained on. `seconds` are the time
    of the warm start and of the training steps, without evaluations, loading and saving; None if not recorded.
    """
    rows = []
    for outcome in outcomes:
        for dataset in outcome.variant.datasets:
            measured = outcome.logged(logged_key(dataset))
            if outcome.variant.kind != "train" or not measured:
                continue
            last = outcome.state["global_step"]
            points = {0: perplexity_of(outcome.one_shot, dataset), **dict(measured)}
            points[last] = perplexity_of(outcome.final, dataset)  # of the saved model, in float32
            rows += [
                {
                    "variant": outcome.name, "seed": outcome.seed, "dataset": dataset, "step": step,
                    "tokens": step * outcome.tokens_per_step, "seconds": _rounded(work_seconds(outcome, step)),
                    "perplexity": perplexity,
                }
                for step, perplexity in sorted(points.items()) if perplexity is not None
            ]  # fmt: skip
    return rows


def work_seconds(outcome: Outcome, step: int) -> float | None:
    """Seconds of the warm start and of the training steps up to `step`; None if the run did not record them.

    Each record of the log has the speed since the one before it. A run that was continued has the records up to its
    checkpoint and those after it, so lost steps count once.
    """
    if outcome.start_seconds is None:
        return None
    seconds, done, speed = outcome.start_seconds, 0, None
    for logged_step, speed in outcome.logged("tokens_per_second"):
        upto = min(logged_step, step)
        seconds += (upto - done) * outcome.tokens_per_step / speed
        done = upto
    if done < step:  # the last steps of a run are not logged if logging_steps does not divide their number
        if speed is None:
            return None
        seconds += (step - done) * outcome.tokens_per_step / speed
    return seconds


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
