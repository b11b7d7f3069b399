"""The results of an evaluation, as tables and as a record for JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ast_sparse.errors import DivergenceError
from ast_sparse.evaluation.harness import TaskResult
from ast_sparse.evaluation.measure import TextResult
from ast_sparse.evaluation.perplexity import NOT_FINITE
from ast_sparse.storage.files import finite_or_none
from ast_sparse.tables import format_table


@dataclass
class Results:
    """What has been measured so far.

    Attributes:
        texts: model, name of the text, dtype and result.
        tasks: model, dtype and result.
    """

    texts: list[tuple[str, str, str, TextResult]] = field(default_factory=list)
    tasks: list[tuple[str, str, TaskResult]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.texts or self.tasks)

    def table(self, *, bits_per_byte: bool, teacher: bool) -> str:
        """The results that were asked for; arguments as in `texts_table`."""
        tables = []
        if self.texts:
            tables.append(texts_table(self.texts, bits_per_byte=bits_per_byte, teacher=teacher))
        if self.tasks:
            tables.append(tasks_table(self.tasks))
        return "\n\n".join(tables)

    def check(self) -> None:
        """Check that all losses are finite, and all values of tasks that are shown are numbers.

        Raises:
            DivergenceError: names the model, the text or task, and the first bad window.
        """
        faults = [(model, text, result.fault()) for model, text, _, result in self.texts]
        faults += [(model, row.task, row.fault()) for model, _, row in self.tasks if row.shown]
        found = list(dict.fromkeys(f"{model}, {what}: {fault}." for model, what, fault in faults if fault is not None))
        if found:
            others = f" The same is true of {len(found) - 1:,} more rows." if len(found) > 1 else ""
            raise DivergenceError(f"{found[0]}{others} {NOT_FINITE}")

    def record(self) -> dict[str, list[dict[str, Any]]]:
        """All results: `results` of texts and, if there are any, `tasks`. Numbers that are not finite are None."""
        record = {
            "results": [
                {"model": model, "dataset": text, "dtype": dtype, **_finite(asdict(result))}
                for model, text, dtype, result in self.texts
            ]
        }
        if self.tasks:
            record["tasks"] = [
                {"model": model, "dtype": dtype, **_finite(asdict(row))} for model, dtype, row in self.tasks
            ]
        return record


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: finite_or_none(value) for name, value in values.items()}


def texts_table(
    rows: Sequence[tuple[str, str, str, TextResult]], *, bits_per_byte: bool = False, teacher: bool = False
) -> str:
    """Perplexities, a row for every model and text.

    Args:
        rows: model, name of the text, dtype and result.
        bits_per_byte, teacher: add these columns; there is one for strides if any row has one.
    """
    headers = ["model", "dataset", "dtype", "window", "windows", "predicted tokens", "perplexity"]
    stride = any(result.stride is not None for *_, result in rows)
    headers[4:4] = ["stride"] if stride else []
    headers += ["bits per byte"] if bits_per_byte else []
    headers += ["KL to teacher", "top-1 agreement"] if teacher else []
    lines = []
    for model, text, dtype, result in rows:
        windows = f"{result.windows:,}" + (f" of {result.all_windows:,}" if result.windows < result.all_windows else "")
        line = [model, text, dtype, result.seq_len, windows, result.predicted_tokens, result.perplexity]
        line[4:4] = [result.stride] if stride else []
        line += [_decimals(result.bits_per_byte)] if bits_per_byte else []
        line += [_decimals(result.teacher_kl), _percent(result.teacher_agreement)] if teacher else []
        lines.append(line)
    return format_table(headers, lines)


def tasks_table(rows: Sequence[tuple[str, str, TaskResult]]) -> str:
    """Metrics of tasks that were asked for, a row for every model, task and metric. Rows: model, dtype and result."""
    has_prompts = any(task.prompt is not None for *_, task in rows)
    headers = ("model", "task", "dtype", *(["prompt"] if has_prompts else []), "few-shot", "examples", "metric")
    lines = [
        (
            model,
            task.task,
            dtype,
            *([task.prompt] if has_prompts else []),
            task.num_fewshot,
            task.examples,
            task.metric,
            *map(_decimals, (task.value, task.stderr)),
        )
        for model, dtype, task in rows
        if task.shown
    ]
    return format_table((*headers, "value", "stderr"), lines)


def _decimals(value: float | None) -> str | None:
    return None if value is None else f"{value:,.4f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2%}"
