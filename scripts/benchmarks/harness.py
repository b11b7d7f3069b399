"""How every benchmark measures and compares with its goal.

A benchmark is a file of this folder: its header has the question, the alternative and the method, its generator
`measure(settings)` yields a `Result` for each case, and it ends with `if __name__ == "__main__": main(measure)`.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from ast_sparse.cli.command import Command
from ast_sparse.peak import peak_bytes, reset_peak, resident_bytes
from ast_sparse.speed.outcomes import Spread
from ast_sparse.tables import format_table
from scripts.provenance import provenance


@dataclass(frozen=True)
class Settings:
    """What one call measures.

    Attributes:
        quick: tiny shapes and one pair, to see that everything runs; the results mean nothing.
        reference: checkout of the public AST code, for the benchmarks that compare with it.
        before: checkout of an earlier commit, for `traffic`.
    """

    quick: bool = False
    reference: Path | None = None
    before: Path | None = None

    @property
    def device(self) -> torch.device:
        """The GPU if there is one, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def pairs(self, full: int) -> int:
        """Number of interleaved measurements: `full`, or 1 in a quick call."""
        return 1 if self.quick else full

    def in_child(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` in a fresh process (in this one if quick); it must be a module-level function.

        Raises:
            BrokenProcessPool: the process was killed, for example because it took too much memory.
        """
        if self.quick:
            return function(*args)
        # a Pool would wait for ever for a process that was killed
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table: a ratio to an alternative measured in the same run, and the goal it must not exceed.

    Attributes:
        unit: `s`, `MB` of peak memory, `B` or `kernels`.
        goal: the highest ratio allowed; it is met if the 20th percentile meets it. None: only reported.
        reason: why nothing was measured on this device.
        notes: what else a reader needs, for example measured bytes.
    """

    question: str
    case: str
    against: str
    unit: str = "s"
    ours: Spread | None = None
    alternative: Spread | None = None
    ratio: Spread | None = None
    goal: float | None = None
    reason: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ours: Sequence[float], alternative: Sequence[float], **kwargs: Any) -> "Result":
        """The result of the measurements of both sides, pair by pair."""
        ratios = [a / b for a, b in zip(ours, alternative, strict=True)]
        return cls(ours=Spread.of(ours), alternative=Spread.of(alternative), ratio=Spread.of(ratios), **kwargs)

    @property
    def verdict(self) -> str:
        """The goal and whether it is met, or why it does not apply."""
        if self.ratio is None:
            return f"not applicable: {self.reason}"
        if self.goal is None:
            return "no goal"
        return f"{'met' if self.ratio.p20 <= self.goal else 'missed'}: <= {self.goal:g}"

    def row(self) -> list[str]:
        """The cells of `table`."""
        scale = 1e3 if self.unit == "s" else 1.0

        def shown(spread: Spread | None) -> str:
            return "-" if spread is None else f"{spread.median * scale:.4g} {'ms' if self.unit == 's' else self.unit}"

        ratio = "-"
        if self.ratio is not None:
            middle, low, high = (f"{each:.3f}" for each in (self.ratio.median, self.ratio.p20, self.ratio.p80))
            ratio = middle if low == high else f"{middle} ({low}-{high})"  # counts have no spread
        return [self.question, self.case, self.against, shown(self.ours), shown(self.alternative), ratio]


def interleave(
    sides: Mapping[str, Callable[[], Any]],
    pairs: int,
    warmup: int = 3,
    prepare: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call of each side. The sides take turns, and each round begins with another one.

    Args:
        prepare: called before each measured call, not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for round_ in range(warmup + pairs):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            if prepare is not None:
                prepare()
            elapsed = _seconds(sides[name])
            if round_ >= warmup:
                times[name].append(elapsed)
    return times


def _seconds(call: Callable[[], Any]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    elapsed = time.perf_counter() - start
    del result  # freed outside the timing, on both sides
    return elapsed


class PeakMemory:
    """`with PeakMemory() as peak:` sets `peak.total`, and `peak.above` without what was held at the start; in bytes.

    On a GPU, what torch allocated there; otherwise the resident high-water mark of this process, so measure each side
    in a child process, where nothing else has left freed memory behind.
    """

    above: int
    total: int

    def __enter__(self) -> "PeakMemory":
        reset_peak()
        self._start = torch.cuda.memory_allocated() if torch.cuda.is_available() else resident_bytes()
        return self

    def __exit__(self, *args: object) -> None:
        self.total = peak_bytes()
        self.above = max(self.total - self._start, 1)  # never 0, so that ratios exist


def table(results: Sequence[Result]) -> str:
    """All results; the last column has the goals as thresholds."""
    headers = ["question", "case", "against", "ours", "alternative", "ratio (p20-p80)", "goal of p20"]
    return format_table(headers, [[*result.row(), result.verdict] for result in results])


def write_lines(results: Sequence[Result], path: Path) -> None:
    """Append the results as JSON lines, each with device, versions, commit and threads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made_with = {**provenance(), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    with path.open("a", encoding="utf-8") as file:
        for result in results:
            content = {**asdict(result), "verdict": result.verdict, **made_with}
            file.write(json.dumps({key: value for key, value in content.items() if value not in (None, "", {})}) + "\n")


def read_lines(path: Path) -> list[Result]:
    """What `write_lines` wrote."""
    results = []
    for line in path.read_text(encoding="utf-8").splitlines():
        content = {key: value for key, value in json.loads(line).items() if key in Result.__dataclass_fields__}
        spreads = {key: Spread(**content[key]) for key in ("ours", "alternative", "ratio") if key in content}
        results.append(Result(**{**content, **spreads}))
    return results


def main(measure: Callable[[Settings], Iterator[Result]]) -> None:
    """The command line of a benchmark file."""

    @click.command(cls=Command, help=sys.modules["__main__"].__doc__)
    @click.option("--quick", is_flag=True, help="Tiny shapes, one pair: only to see that it runs.")
    @click.option("--reference", type=click.Path(exists=True, path_type=Path), help="Checkout of the public AST code.")
    @click.option("--before", type=click.Path(exists=True, path_type=Path), help="Checkout of an earlier commit.")
    @click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Append the results as JSON lines.")
    def command(quick: bool, reference: Path | None, before: Path | None, out: Path | None) -> None:
        results = []
        try:
            for result in measure(Settings(quick, reference, before)):
                results.append(result)
                click.echo(f"{' | '.join(result.row())} | {result.verdict}", err=True)
        finally:  # an error does not take along what was measured before it
            if results:
                click.echo(table(results))
                if out is not None:
                    write_lines(results, out)

    command()
