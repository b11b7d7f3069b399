"""The results of a study's runs, as rows of one table: results.csv, provenance.json and the console."""

import csv
import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ast_sparse.errors import UserError
from ast_sparse.sparsity.oneshot import METHODS
from ast_sparse.storage.files import read_json, write_json
from ast_sparse.storage.run_folder import MASK_HISTORY
from ast_sparse.storage.stage_results import RESULTS, StageResult
from ast_sparse.tables import format_table
from scripts.studies.variants import Study, Variant, eval_file

Results = dict[str, StageResult]  # by data set

_SAME = 1e-3  # relative difference of perplexities that another number of threads can make


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished variant: its perplexities by stage, what training logged, and what each mask refresh flipped."""

    variant: Variant
    record: dict[str, Any]
    final: Results
    dense: Results = field(default_factory=dict)
    one_shot: Results = field(default_factory=dict)
    one_shot_name: str = ""
    state: dict[str, Any] = field(default_factory=dict)  # trainer_state.json
    history: list[dict[str, Any]] = field(default_factory=list)  # mask_history.jsonl
    start_seconds: float | None = 0.0  # of pruning before training; None if that took time and was not recorded

    @property
    def name(self) -> str:
        """The name of the variant, which its seeds share."""
        return self.variant.name

    @property
    def label(self) -> str:
        """The name of the variant, and its seed if it has one."""
        return self.variant.label

    @property
    def seed(self) -> int | None:
        """The seed of the training, or of the calibration if it was only pruned; None if it was only measured."""
        config = self.variant.config
        seeds = {"train": config.training.get("seed", 42), "prune": config.calibration.seed}  # 42: TrainingArguments
        return seeds.get(self.variant.kind)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step of a training run; studies run in one process."""
        config = self.variant.config
        accumulated: int = config.training.get("gradient_accumulation_steps", 1)
        return int(self.state.get("train_batch_size", 0)) * accumulated * config.data.block_size

    def logged(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of each log entry that has `key`."""
        return [(entry["step"], entry[key]) for entry in self.state.get("log_history", ()) if key in entry]

    def last(self, key: str) -> float | None:
        """The last value that was logged under `key`."""
        values = self.logged(key)
        return values[-1][1] if values else None


def read_outcomes(finished: Iterable[tuple[Variant, dict[str, Any], Path]]) -> list[Outcome]:
    """Read what finished variants left in their folders.

    Raises:
        UserError: a file of a finished variant is missing or damaged.
    """
    outcomes = []
    for variant, record, folder in finished:
        try:
            outcomes.append(_read_outcome(variant, record, folder))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{variant.name} is finished, but {folder} does not hold its results ({error}). Remove "
                f"{folder.name}.json and the folder to run it again."
            ) from None
    return outcomes


def write_results(study: Study, outcomes: Sequence[Outcome], out: Path, made: dict[str, Any]) -> None:
    """Write OUT/results.csv and OUT/provenance.json, without paths of this machine.

    Args:
        made: root of the checkout, arguments of the command, commit, device, versions.
    """
    hide = _Placeholders(outcomes, out, made["root"])
    rows = [{"study": study.path.stem, **row} for row in table_rows(outcomes)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (out / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: hide(value) for key, value in row.items()} for row in rows)
    content = {
        "study": study.path.stem,
        "title": study.title,
        "command": shlex.join(["python", "scripts/studies/run.py", *map(hide, made["arguments"])]),
        **{key: made[key] for key in ("commit", "device", "versions")},
        "variants": [
            {**{key: value for key, value in outcome.record.items() if key != "resolved"}, "seed": outcome.seed}
            for outcome in outcomes
        ],
    }
    write_json(out / "provenance.json", hide(content))


def table_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per variant, below those of the dense and the one-shot model; results that do not exist are None."""
    datasets = dataset_names(outcomes)
    rows = []
    for outcome in outcomes:
        rows.append({
            "variant": outcome.name, "kind": outcome.variant.kind, **_perplexities(outcome.final, datasets),
            **{f"one_shot_{short_name(name)}": perplexity_of(outcome.one_shot, name) for name in datasets},
            **_training_values(outcome), "seed": outcome.seed, **_made_with(outcome),
        })  # fmt: skip
    return [*_reference_rows(outcomes, datasets), *rows]


def results_table(outcomes: Sequence[Outcome]) -> str:
    """The table for the console; one-shot results are columns if the variants start from different ones."""
    datasets = dataset_names(outcomes)
    rows = table_rows(outcomes)
    own_start = bool(_started_dense(outcomes)) and not _shares_one_shot(outcomes)
    seed = {"seed": "seed"} if any(outcome.variant.seed is not None for outcome in outcomes) else {}
    columns = {"variant": "variant", **seed, **{short_name(name): _with_window(name, outcomes) for name in datasets}}
    if own_start:
        columns |= {f"one_shot_{short_name(name)}": f"one-shot {short_name(name)}" for name in datasets}
    columns |= {"steps": "steps", "train_seconds": "train s", "flops": "FLOPs"}
    for row in rows:
        flops = [row[key] for key in ("student_flops", "teacher_flops") if row.get(key) is not None]
        row["flops"] = f"{sum(flops):.3g}" if flops else None
        row["train_seconds"] = None if row.get("train_seconds") is None else round(row["train_seconds"])
    used = [key for key in columns if any(row.get(key) is not None for row in rows)]
    return format_table([columns[key] for key in used], [[row.get(key) for key in used] for row in rows])


def dataset_names(outcomes: Sequence[Outcome]) -> list[str]:
    """Data sets that any of the variants was measured on."""
    return list(dict.fromkeys(name for outcome in outcomes for name in (*outcome.dense, *outcome.final)))


def short_name(dataset: str) -> str:
    """A column name: for a text file its name, without its folder."""
    return Path(dataset).name


def dense_results(outcomes: Sequence[Outcome]) -> Results:
    """The results of the dense model, which every training run that starts from it measures first."""
    return next((outcome.dense for outcome in outcomes if outcome.dense), {})


def _read_outcome(variant: Variant, record: dict[str, Any], folder: Path) -> Outcome:
    if variant.kind != "train":
        files = {name: read_json(eval_file(folder, name))["results"][0] for name in variant.datasets}
        return Outcome(variant=variant, record=record, final=files)
    stages = read_json(folder / RESULTS)
    starting = {word: next((stage for stage in stages if stage.startswith(word)), "") for word in ("one-shot", "retr")}
    history = folder / MASK_HISTORY
    lines = history.read_text(encoding="utf-8").splitlines() if history.exists() else []
    return Outcome(
        variant=variant, record=record, final=stages[starting["retr"]], dense=stages.get("dense", {}),
        one_shot=stages.get(starting["one-shot"], {}), one_shot_name=starting["one-shot"],
        state=read_json(folder / "trainer_state.json"), history=[json.loads(line) for line in lines],
        start_seconds=_start_seconds(variant, folder),
    )  # fmt: skip


def _start_seconds(variant: Variant, folder: Path) -> float | None:
    """Seconds of the calibration, the change of basis and the pruning before training; the magnitude start is free.

    None for a start that a killed process began and another one continued, or one that left no record.
    """
    file = folder / "start" / "start.json"
    if file.exists():
        seconds = read_json(file)["seconds"]
        return None if seconds is None else float(seconds)
    basis = variant.config.basis
    is_free = not METHODS[variant.config.sparsity.init].needs_text and (basis is None or not basis.is_on)
    return 0.0 if is_free else None


def _reference_rows(outcomes: Sequence[Outcome], datasets: Sequence[str]) -> list[dict[str, Any]]:
    """The dense model, and the one-shot model if all runs started from the same one; not if they have rows already."""
    rows = []
    if all(outcome.name != "dense" for outcome in outcomes):
        first = next((outcome for outcome in outcomes if outcome.dense), None)
        rows += [_reference_row("dense", "dense", first, first.dense, datasets)] if first else []
    if _shares_one_shot(outcomes) and all(outcome.variant.kind != "prune" for outcome in outcomes):
        first = _started_dense(outcomes)[0]
        rows.append(_reference_row(first.one_shot_name, "one-shot", first, first.one_shot, datasets))
    return rows


def _reference_row(
    name: str, kind: str, measured_by: Outcome, results: Results, datasets: Sequence[str]
) -> dict[str, Any]:
    starts = [f"one_shot_{short_name(dataset)}" for dataset in datasets]
    none = dict.fromkeys([*starts, *_training_values(measured_by), "seed"])
    return {"variant": name, "kind": kind, **_perplexities(results, datasets), **none, **_made_with(measured_by)}


def _started_dense(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Training runs that started from the dense model and pruned it at once."""
    return [outcome for outcome in outcomes if outcome.dense and outcome.one_shot]


def _shares_one_shot(outcomes: Sequence[Outcome]) -> bool:
    """Whether they all started from the same one-shot model, judging by its perplexity."""
    starts = [outcome.one_shot for outcome in _started_dense(outcomes)]
    return bool(starts) and all(_is_same(start, starts[0]) for start in starts)


def _is_same(one: Results, other: Results) -> bool:
    return one.keys() == other.keys() and all(
        math.isclose(_number(one, name), _number(other, name), rel_tol=_SAME) for name in one
    )


def _perplexities(results: Results, datasets: Sequence[str]) -> dict[str, Any]:
    columns: dict[str, Any] = {short_name(name): perplexity_of(results, name) for name in datasets}
    for key in ("windows", "seq_len"):
        for name in datasets:
            columns[f"{key}_{short_name(name)}"] = results[name].get(key) if name in results else None
    return columns


def _training_values(outcome: Outcome) -> dict[str, Any]:
    """Steps, tokens, time, FLOPs, flip rates and loss of a training run.

    `train_seconds`, and so `tokens_per_second`, include evaluations and saving; the log's speed does not.
    """
    steps = outcome.state.get("global_step")
    tokens = steps * outcome.tokens_per_step if steps else None
    # for a resumed run, the trainer knows only the time of the last part
    seconds = outcome.last("train_runtime") if outcome.record.get("starts", 1) == 1 else None
    refresh = outcome.history[-1] if outcome.history else {}
    return {
        "steps": steps,
        "tokens": tokens,
        "train_seconds": seconds,
        "tokens_per_second": round(tokens / seconds, 2) if tokens and seconds else None,
        "seconds": round(outcome.record["seconds"], 1),
        "student_flops": outcome.last("student_flops"),
        "teacher_flops": outcome.last("teacher_flops"),
        "flip_rate": refresh.get("flip_rate"),
        "initial_flip_rate": refresh.get("initial_flip_rate"),
        "train_loss": outcome.last("loss"),
    }


def _made_with(outcome: Outcome) -> dict[str, Any]:
    record = outcome.record
    return {"commit": record["commit"], "device": record["device"], **record["versions"]}


def perplexity_of(results: Results, name: str) -> float | None:
    """The perplexity on a data set; None if it was not measured, or is not finite."""
    return results[name]["perplexity"] if name in results else None


def _number(results: Results, name: str) -> float:
    value = results[name]["perplexity"] if name in results else None
    return math.inf if value is None or math.isnan(value) else value


def _with_window(dataset: str, outcomes: Sequence[Outcome]) -> str:
    result = next(outcome.final[dataset] for outcome in outcomes if dataset in outcome.final)
    return f"{short_name(dataset)} ({result['windows']} x {result['seq_len']})"


class _Placeholders:
    """Replaces paths of this machine with MODEL, DATA, WIKITEXT2, TEACHER and OUT; of other paths, keeps the name."""

    _PATH = re.compile(r"(?<![\w./~…:-])~?(?:/[^\s\"',\[\]{}]+)+/?")

    def __init__(self, outcomes: Sequence[Outcome], out: Path, root: Path) -> None:
        self.known = {str(out): "OUT", str(out.resolve()): "OUT"}
        for outcome in outcomes:
            config = outcome.variant.config
            places = {
                config.model.name_or_path: "MODEL", config.data.root: "DATA", config.evaluation.data_dir: "WIKITEXT2",
                config.model.teacher: "TEACHER",
            }  # fmt: skip
            self.known |= {str(path): name for path, name in places.items() if path and str(path) not in self.known}
        self.known = {path: name for path, name in self.known.items() if Path(path).expanduser().is_absolute()}
        self.root = f"{root}/"

    def __call__(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self(item) for item in value]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        for path in sorted(self.known, key=len, reverse=True):
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w.-])", self.known[path], text)
        text = text.replace(self.root, "")
        return self._PATH.sub(lambda match: f"…/{match[0].rstrip('/').split('/')[-1]}", text)
