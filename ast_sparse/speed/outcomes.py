"""What was measured: seconds of both models case by case, their ratios, and tables of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ast_sparse.speed.bytes_read import WeightBytes
from ast_sparse.speed.cases import Case
from ast_sparse.tables import format_table


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of one quantity."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist())


@dataclass(frozen=True)
class Timing:
    """One model in one case.

    Attributes:
        prefill: seconds until the first new token of every prompt, a value for each repeat.
        step: seconds of a later step (one token of each prompt), a value for each turn.
        peak: peak memory in bytes.
    """

    prefill: list[float]
    step: list[float]
    peak: int


@dataclass(frozen=True)
class Outcome:
    """One case.

    Attributes:
        timings: by side, in the order of the turns; empty if nothing was measured.
        same: how many new tokens the two models have in common before their first difference, and how many there are;
            None if there is one model.
        reason: why there are no timings, or fewer repeats; empty if all is as asked.
        is_failure: the reason is a failure, not a limit.
    """

    case: Case
    timings: dict[str, Timing] = field(default_factory=dict)
    same: tuple[int, int] | None = None
    reason: str = ""
    is_failure: bool = False

    @property
    def is_measured(self) -> bool:
        return bool(self.timings)

    def speedup(self, what: str) -> Spread | None:
        """How much faster the first model is than the second, turn by turn; `what` is `prefill` or `step`."""
        if len(self.timings) < 2:
            return None
        ours, other = (getattr(timing, what) for timing in self.timings.values())
        return Spread.of([b / a for a, b in zip(ours, other, strict=True)])

    def tokens_per_second(self, side: str) -> tuple[Spread, Spread]:
        """Tokens per second of prefill and of decode, over all prompts."""
        timing, case = self.timings[side], self.case
        prefill = Spread.of([case.batch * case.prompt / seconds for seconds in timing.prefill])
        return prefill, Spread.of([case.batch / seconds for seconds in timing.step])

    def record(self) -> dict[str, Any]:
        """For JSON: what was measured, and what follows from it."""
        record: dict[str, Any] = asdict(self)
        for side, timing in self.timings.items():
            prefill, decode = self.tokens_per_second(side)
            record["timings"][side] = {
                "prefill_seconds": timing.prefill,
                "step_seconds": timing.step,
                "peak_bytes": timing.peak,
                "prefill_tokens_per_second": asdict(prefill),
                "decode_tokens_per_second": asdict(decode),
            }
        for what in ("prefill", "step"):
            if (speedup := self.speedup(what)) is not None:
                record[f"{what}_speedup"] = asdict(speedup)
        return record

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Outcome":
        """What `record` wrote."""
        timings = {
            side: Timing(values["prefill_seconds"], values["step_seconds"], values["peak_bytes"])
            for side, values in record["timings"].items()
        }
        same = None if record["same"] is None else (record["same"][0], record["same"][1])
        return cls(Case(**record["case"]), timings, same, record["reason"], record["is_failure"])


def bound(weights: Mapping[str, WeightBytes]) -> float | None:
    """Bytes that the second model reads for a token, by those of the first: the gain if both read equally fast."""
    reads = [each.read for each in weights.values()]
    return None if len(reads) < 2 or reads[0] is None or reads[1] is None else reads[1] / reads[0]


def speed_table(outcomes: Sequence[Outcome], weights: Mapping[str, WeightBytes]) -> str:
    """A row for each case and model; ratios are in the row of the first model."""
    headers = [
        "prompt/new", "batch", "model", "prefill tok/s", "first token ms", "decode tok/s", "ms a token", "(p20-p80)",
        "prefill ×", "decode ×", "bound ×", "same tokens",
    ]  # fmt: skip
    pair = len(weights) > 1
    limit, rows = bound(weights), []
    for outcome in outcomes:
        case = outcome.case
        for index, (side, timing) in enumerate(outcome.timings.items()):
            prefill, decode = outcome.tokens_per_second(side)
            step = Spread.of([1e3 * seconds for seconds in timing.step])
            row: list[object] = [f"{case.prompt:,}/{case.new:,}", case.batch, side, f"{prefill.median:,.1f}"]
            row += [f"{1e3 * Spread.of(timing.prefill).median:,.1f}", f"{decode.median:,.2f}", f"{step.median:,.2f}"]
            row += [f"{step.p20:,.2f}-{step.p80:,.2f}"]
            if index:
                row += [""] * 4
            elif pair:
                same = outcome.same
                # the bound is that of one token of one prompt; more prompts share what is read
                row += [_ratio(outcome.speedup("prefill")), _ratio(outcome.speedup("step"))]
                row += [f"{limit:.2f}" if limit is not None else "-", f"{same[0]:,} of {same[1]:,}" if same else "-"]
            rows.append(row if pair else row[:8])
    return format_table(headers if pair else headers[:8], rows)


def _ratio(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f} ({spread.p20:.2f}-{spread.p80:.2f})"


def memory_table(outcomes: Sequence[Outcome], weights: Mapping[str, WeightBytes]) -> str:
    """Bytes of the weights and the largest peak of each model."""
    rows = []
    for side, held in weights.items():
        peak = max((outcome.timings[side].peak for outcome in outcomes if outcome.is_measured), default=None)
        sizes = (held.total, held.read, peak)
        rows.append([side, *("-" if size is None else f"{size / 1e6:,.1f} MB" for size in sizes)])
    return format_table(["model", "weights", "read for a token", "peak memory of the process"], rows)


def left_out(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each case that was not measured as asked."""
    return [f"{outcome.case}: {outcome.reason}" for outcome in outcomes if outcome.reason]
