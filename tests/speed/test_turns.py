"""The order of the turns, the tokens that agree, limits of time, failures."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ast_sparse.errors import UserError
from ast_sparse.speed import turns
from ast_sparse.speed.cases import Case, all_cases
from ast_sparse.speed.comparison import Comparison, find_comparison
from ast_sparse.speed.outcomes import Outcome
from ast_sparse.speed.side import InProcess
from ast_sparse.speed.turns import agreement, measure
from tests.speed.sides import Scripted

OURS, OTHER = "compressed", "compressed-decoded"


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted.reset()


def comparison(
    exports: Path, lengths: Sequence[tuple[int, int]] = ((8, 40),), batches: Sequence[int] = (1,), repeats: int = 2
) -> Comparison:
    return find_comparison(exports / "compressed", cases=all_cases(lengths, batches), repeats=repeats)


def test_both_models_give_the_same_tokens(exports: Path) -> None:
    machine: dict[str, Any] = {}
    found = measure(
        comparison(exports, lengths=[(6, 20), (5, 3)], batches=[1, 2], repeats=1),
        progress=False, about=machine.update, start=InProcess,
    )  # fmt: skip
    assert [outcome.case for outcome in found] == [Case(6, 20, 1), Case(6, 20, 2), Case(5, 3, 1), Case(5, 3, 2)]
    assert [outcome.same for outcome in found] == [(20, 20), (40, 40), (3, 3), (6, 6)]
    for outcome in found:
        assert list(outcome.timings) == ["compressed", "dense"]
        assert all(timing.peak > 10**6 and min(timing.prefill + timing.step) > 0 for timing in outcome.timings.values())
    assert machine["threads"] and machine["versions"]["torch"]


def test_models_take_turns_and_each_begins_as_often(exports: Path, scripted: type[Scripted]) -> None:
    (found,) = measure(comparison(exports), progress=False, start=scripted)
    for timing in found.timings.values():
        assert len(timing.prefill) == 2 and len(timing.step) == 2 * 3  # 39 steps: 16, 16, 7
    timed = [(name, do) for name, do in scripted.calls[6:] if do != "finish"]  # after the warm-up
    firsts = {do: [timed[i][0] for i in range(0, len(timed), 2) if timed[i][1] == do] for do in ("begin", "advance")}
    assert [do for _, do in timed] == (["begin"] * 2 + ["advance"] * 6) * 2
    assert all({timed[i][0], timed[i + 1][0]} == {OURS, OTHER} for i in range(0, len(timed), 2))
    assert firsts == {"begin": [OURS, OTHER], "advance": [OURS, OTHER] * 3}
    assert scripted.opened == 0


def test_times_are_those_of_one_step(exports: Path, scripted: type[Scripted]) -> None:
    scripted.seconds = {OURS: (0.001, 0.01), OTHER: (0.002, 0.015)}
    (found,) = measure(comparison(exports), progress=False, start=scripted)
    step, prefill = found.speedup("step"), found.speedup("prefill")
    assert step is not None and step.median == pytest.approx(1.5)
    assert prefill is not None and prefill.median == pytest.approx(2.0)


def test_tokens_count_until_the_first_difference() -> None:
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 9, 6]]) == (4, 6)
    assert agreement([[1], [2]], [[0], [2]]) == (1, 2)


def test_differing_tokens_are_counted(exports: Path, scripted: type[Scripted]) -> None:
    scripted.tokens = {OURS: [1] * 40, OTHER: [1] * 30 + [2] * 10}
    (found,) = measure(comparison(exports), progress=False, start=scripted)
    assert found.same == (30, 40)


def test_a_failed_case_leaves_the_others(exports: Path, scripted: type[Scripted]) -> None:
    scripted.fails = {("advance", 4)}
    kept: list[list[Outcome]] = []
    found = measure(comparison(exports, batches=[1, 4, 8]), progress=False, keep=kept.append, start=scripted)
    assert [outcome.is_measured for outcome in found] == [True, False, True]
    assert found[1].is_failure and found[1].reason == "failed: compressed: no memory is left"
    assert [len(each) for each in kept] == [1, 2, 3] and scripted.opened == 0
    assert [do for _, do in scripted.calls].count("advance") == 2 * (2 * (1 + 6)) + 1


def test_a_model_that_does_not_load_ends_it(exports: Path, scripted: type[Scripted]) -> None:
    scripted.fails = {("load", 1)}
    with pytest.raises(UserError, match="compressed` cannot be loaded in transformers: no memory is left"):
        measure(comparison(exports), progress=False, start=scripted)
    assert scripted.opened == 0


def test_ctrl_c_keeps_the_cases_before_it_and_ends_the_processes(
    exports: Path, scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[Outcome]] = []

    def keep(outcomes: list[Outcome]) -> None:
        kept.append(outcomes)
        monkeypatch.setattr(scripted, "ask", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))

    with pytest.raises(KeyboardInterrupt):
        measure(comparison(exports, batches=[1, 4]), progress=False, keep=keep, start=scripted)
    assert [outcome.case.batch for outcome in kept[-1]] == [1] and scripted.opened == 0


def test_measured_cases_of_an_earlier_run_are_not_measured_again(exports: Path, scripted: type[Scripted]) -> None:
    both = comparison(exports, batches=[1, 4])
    scripted.fails = {("begin", 4)}
    first = measure(both, progress=False, start=scripted)
    scripted.fails, scripted.calls = set(), []
    second = measure(both, done=first, progress=False, start=scripted)
    assert second[0] == first[0] and second[1].is_measured
    scripted.calls = []
    assert measure(replace(both, cases=both.cases[:1]), done=second, progress=False, start=scripted) == second
    assert not scripted.calls  # nothing was missing, so nothing was loaded


class Clock:
    """Time that passes only while a side computes."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch) -> Clock:
    found, answer = Clock(), Scripted.answer

    def slow(side: Scripted) -> Any:
        value = answer(side)
        found.now += value if isinstance(value, float) else 0.0
        return value

    monkeypatch.setattr(turns, "time", found)
    monkeypatch.setattr(scripted, "answer", slow)
    return found


def test_what_would_take_too_long_is_left_out(exports: Path, scripted: type[Scripted], clock: Clock) -> None:
    scripted.seconds = {OURS: (0.1, 1.0), OTHER: (0.1, 1.0)}
    both = comparison(exports, lengths=[(8, 17), (8, 101), (8, 33)], repeats=2)
    found = measure(both, minutes=4.0, progress=False, start=scripted)
    # 17: 2 models x (3 x 0.8 s + 2 x 16 s and 2 steps to warm up) = 72.8 s of 240; 101 needs 404.8 s, 33: 132.8 s
    assert [outcome.is_measured for outcome in found] == [True, False, True]
    assert found[1].reason == "left out: needs 6.7 minutes or more, and 2.8 of --max-minutes are left"
    assert clock.now <= 240


def test_the_warm_up_finds_out_what_the_first_case_takes(exports: Path, scripted: type[Scripted], clock: Clock) -> None:
    scripted.seconds = {OURS: (0.1, 1.0), OTHER: (0.1, 1.0)}
    (found,) = measure(comparison(exports, lengths=[(8, 101)]), minutes=1.0, progress=False, start=scripted)
    assert not found.is_measured and not found.is_failure and clock.now < 10


def test_repeats_end_when_time_does(exports: Path, scripted: type[Scripted], clock: Clock) -> None:
    scripted.seconds = {OURS: (0.1, 1.0), OTHER: (0.1, 1.0)}
    rising = iter(range(1000))
    answer = scripted.answer

    def slower(side: Scripted) -> Any:
        clock.now += 0.5 * next(rising)  # other load on the machine, which no forecast knows
        return answer(side)

    scripted.answer = slower  # type: ignore[method-assign]
    (found,) = measure(comparison(exports, lengths=[(8, 17)], repeats=3), minutes=3.0, progress=False, start=scripted)
    assert found.is_measured and found.reason.endswith("of 3 repeats, for lack of time (--max-minutes)")
    assert len(found.timings["dense"].prefill) == int(found.reason[0]) < 3
