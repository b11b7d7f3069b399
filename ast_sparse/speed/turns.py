"""Measure two models in turns: whatever else the machine does then slows both."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from ast_sparse.errors import UserError
from ast_sparse.progress import progress_bar
from ast_sparse.speed.cases import Case
from ast_sparse.speed.comparison import Comparison, with_dense_folder
from ast_sparse.speed.outcomes import Outcome, Timing
from ast_sparse.speed.side import Process, Side, SideFailed, SideSpec, as_list

TURN = 16  # steps of one model before the other's turn
_WARM_STEPS = 2

Start = Callable[[SideSpec, Sequence[Case]], Side]


def measure(
    comparison: Comparison,
    *,
    minutes: float | None = None,
    done: Sequence[Outcome] = (),
    keep: Callable[[list[Outcome]], None] = lambda outcomes: None,
    about: Callable[[dict[str, Any]], None] = lambda machine: None,
    progress: bool = True,
    start: Start | None = None,
) -> list[Outcome]:
    """Measure all cases; each model is loaded once, in a process of its own.

    In a case each model computes the prompts, then both continue them in turns of `TURN` steps. Who begins changes: for
    the prompts from repeat to repeat, for the steps from turn to turn. Before that, a few steps are not timed.

    Args:
        minutes: cases that would take longer are left out, with the reason; None: no limit.
        done: outcomes of an earlier run; its measured cases are not measured again.
        keep: called after each case with all outcomes so far.
        about: called with the machine, as the first model's process sees it.
        progress: show a progress bar.
        start: starts a model; None: a process for each, `Process`.

    Returns:
        The outcomes; those of earlier runs and of cases that do not fit come last. A failed case has one too, and the
        others go on.

    Raises:
        UserError: a model cannot be loaded.
    """
    found = {
        outcome.case: outcome
        for outcome in (*comparison.too_long, *done)
        if outcome.case not in comparison.cases or outcome.is_measured
    }
    watch = _Watch(None if minutes is None else time.perf_counter() + 60 * minutes, comparison.repeats)
    for outcome in found.values():
        watch.learn(outcome.case, outcome.timings)
    if missing := [case for case in comparison.cases if case not in found]:
        with with_dense_folder(comparison) as ready, closing(_Sides(ready, start or Process, about)) as sides:
            sides.ready()
            total = sum(_size(case, comparison) for case in missing)
            with progress_bar(total=total, desc="Measuring", unit="token", disable=not progress) as bar:
                before = 0
                for case in missing:
                    bar.set_postfix_str(str(case))
                    found[case] = _measure_case(case, sides, watch, bar.update)
                    keep(_ordered(found, comparison))
                    before += _size(case, comparison)
                    bar.update(before - bar.n)  # what was left out
    return _ordered(found, comparison)


def _ordered(found: Mapping[Case, Outcome], comparison: Comparison) -> list[Outcome]:
    """The outcomes in the order of the cases, then those of an earlier run that are not asked for now."""
    asked = [case for case in comparison.cases if case in found]
    return [found[case] for case in (*asked, *(case for case in found if case not in asked))]


def _size(case: Case, comparison: Comparison) -> int:
    return case.new * comparison.repeats * len(comparison.specs)


class _Sides:
    """The processes of the models: started when they are needed, and again after a failure."""

    def __init__(self, comparison: Comparison, start: Start, about: Callable[[dict[str, Any]], None]) -> None:
        self.comparison, self._start, self._about = comparison, start, about
        self._running: dict[str, Side] = {}

    @property
    def names(self) -> list[str]:
        return list(self.comparison.specs)

    def ready(self) -> None:
        """Start what does not run; both load at the same time."""
        if self._running:
            return
        specs = self.comparison.specs
        try:
            for name, spec in specs.items():
                self._running[name] = self._start(spec, self.comparison.cases)
            machines = [self._loaded(name, side) for name, side in self._running.items()]
        except BaseException:
            self.close()
            raise
        self._about(machines[0])

    def _loaded(self, name: str, side: Side) -> dict[str, Any]:
        try:
            machine: dict[str, Any] = side.answer()
        except SideFailed as error:
            spec = self.comparison.specs[name]
            raise UserError(f"`{spec.folder}` cannot be loaded in {spec.engine}: {error}") from error
        return machine

    def ask(self, name: str, do: str, **arguments: Any) -> Any:
        """The answer of one model; its errors have its name."""
        self._running[name].ask(do, **arguments)
        try:
            return self._running[name].answer()
        except (SideFailed, UserError) as error:
            raise SideFailed(f"{name}: {error}") from error

    def close(self) -> None:
        for side in self._running.values():
            side.close()
        self._running = {}


@dataclass
class _Watch:
    """What is left of the time, and what a case takes at least, by what the cases so far took."""

    end: float | None
    repeats: int
    prefill: dict[str, float] = field(default_factory=dict)  # seconds of one token, the least so far
    step: dict[str, dict[int, float]] = field(default_factory=dict)  # by batch

    def learn(self, case: Case, timings: Mapping[str, Timing]) -> None:
        for name, timing in timings.items():
            each = min(timing.prefill) / (case.batch * case.prompt)
            self.prefill[name] = min(each, self.prefill.get(name, each))
            steps = self.step.setdefault(name, {})
            steps[case.batch] = min(min(timing.step), steps.get(case.batch, min(timing.step)))

    def left(self) -> float:
        return float("inf") if self.end is None else self.end - time.perf_counter()

    def refusal(self, case: Case) -> str:
        """Why there is no time for a case; empty if there is."""
        least = 0.0
        for name, each in self.prefill.items():
            least += (self.repeats + 1) * each * case.batch * case.prompt
            fits = [seconds for batch, seconds in self.step[name].items() if batch <= case.batch]
            least += self.repeats * (case.new - 1) * max(fits, default=0.0)
        left = self.left()
        if left > max(least, 0.0):
            return ""
        spare = f"{max(left, 0) / 60:,.1f} of --max-minutes are left"
        return f"left out: needs {least / 60:,.1f} minutes or more, and {spare}"


def _measure_case(case: Case, sides: _Sides, watch: _Watch, update: Callable[[int], Any]) -> Outcome:
    if reason := watch.refusal(case):
        return Outcome(case, reason=reason)
    sides.ready()
    try:
        watch.learn(case, {name: _warm(case, name, sides) for name in sides.names})
        if reason := watch.refusal(case):
            return Outcome(case, reason=reason)
        outcome = _in_turns(case, sides, watch, update)
    except SideFailed as error:
        sides.close()
        return Outcome(case, reason=f"failed: {error}", is_failure=True)
    watch.learn(case, outcome.timings)
    return outcome


def _warm(case: Case, name: str, sides: _Sides) -> Timing:
    prefill: float = sides.ask(name, "begin", case=as_list(case))
    steps = min(_WARM_STEPS, case.new - 1)
    seconds: float = sides.ask(name, "advance", steps=steps)
    sides.ask(name, "finish")
    return Timing([prefill], [seconds / steps], 0)


def _in_turns(case: Case, sides: _Sides, watch: _Watch, update: Callable[[int], Any]) -> Outcome:
    names, reason = sides.names, ""
    timings: dict[str, Timing] = {name: Timing([], [], 0) for name in names}
    tokens: dict[str, list[list[int]]] = {}
    turn, longest = 0, 0.0  # turns of all repeats
    for repeat in range(watch.repeats):
        began = time.perf_counter()
        if repeat and watch.left() < longest:
            reason = f"{repeat} of {watch.repeats} repeats, for lack of time (--max-minutes)"
            break
        for name in _rotated(names, repeat):
            timings[name].prefill.append(sides.ask(name, "begin", case=as_list(case)))
            update(1)
        for done in range(0, case.new - 1, TURN):
            steps = min(TURN, case.new - 1 - done)
            for name in _rotated(names, turn):
                timings[name].step.append(sides.ask(name, "advance", steps=steps) / steps)
                update(steps)
            turn += 1
        for name in names:
            end = sides.ask(name, "finish")
            tokens.setdefault(name, end["tokens"])
            timings[name] = Timing(timings[name].prefill, timings[name].step, max(timings[name].peak, end["peak"]))
        longest = max(longest, time.perf_counter() - began)
    same = agreement(*tokens.values()) if len(names) > 1 else None
    return Outcome(case, timings, same, reason)


def _rotated(names: list[str], turn: int) -> list[str]:
    shift = turn % len(names)
    return names[shift:] + names[:shift]


def agreement(ours: list[list[int]], other: list[list[int]]) -> tuple[int, int]:
    """How many tokens are the same before the first difference of each row, and how many there are."""
    same = 0
    for row, twin in zip(ours, other, strict=True):
        same += next((index for index, pair in enumerate(zip(row, twin, strict=True)) if pair[0] != pair[1]), len(row))
    return same, sum(map(len, ours))
