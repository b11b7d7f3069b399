"""Ratios, tokens per second and tables, from times that are known."""

import json

import pytest

from ast_sparse.speed.bytes_read import WeightBytes
from ast_sparse.speed.cases import Case
from ast_sparse.speed.outcomes import Outcome, Spread, Timing, bound, left_out, memory_table, speed_table

WEIGHTS = {"compressed": WeightBytes(9_000_000, 8_000_000), "dense": WeightBytes(15_000_000, 14_000_000)}
OURS = Timing(prefill=[0.5, 1.0, 0.5], step=[0.01, 0.02, 0.01, 0.01, 0.04], peak=100_000_000)
OTHER = Timing(prefill=[1.0, 1.0, 1.0], step=[0.02, 0.02, 0.03, 0.02, 0.04], peak=200_000_000)
OUTCOME = Outcome(Case(100, 6, 4), {"compressed": OURS, "dense": OTHER}, same=(20, 24))


def test_speedups_are_taken_turn_by_turn() -> None:
    step, prefill = OUTCOME.speedup("step"), OUTCOME.speedup("prefill")
    assert step is not None and step.median == 2.0 and step.p20 == 1.0 and step.p80 == pytest.approx(2.2)
    assert prefill is not None and prefill.median == 2.0
    assert Outcome(Case(1, 2, 1), {"model": OURS}).speedup("step") is None


def test_tokens_of_all_prompts_count() -> None:
    prefill, decode = OUTCOME.tokens_per_second("compressed")
    assert prefill.median == 800.0 and prefill.p20 == pytest.approx(560.0)
    assert decode.median == 400.0


def test_the_bound_is_the_ratio_of_what_is_read() -> None:
    assert bound(WEIGHTS) == 1.75
    assert bound({"model": WEIGHTS["dense"]}) is None
    assert bound({**WEIGHTS, "dense": WeightBytes(1, None)}) is None


def test_an_outcome_comes_back_from_json() -> None:
    for outcome in (OUTCOME, Outcome(Case(1, 2, 3), reason="failed: x", is_failure=True)):
        assert Outcome.of(json.loads(json.dumps(outcome.record()))) == outcome
    assert OUTCOME.record()["step_speedup"]["median"] == 2.0
    assert OUTCOME.record()["timings"]["dense"]["decode_tokens_per_second"]["median"] == 200.0


def test_the_table_shows_both_models_and_their_ratios_once() -> None:
    lines = speed_table([OUTCOME], WEIGHTS).splitlines()
    ours, other = (line.split() for line in lines[2:])
    assert ours[:8] == ["100/6", "4", "compressed", "800.0", "500.0", "400.00", "10.00", "10.00-24.00"]
    assert " ".join(ours[8:]) == "2.00 (1.40-2.00) 2.00 (1.00-2.20) 1.75 20 of 24"
    assert other == ["100/6", "4", "dense", "400.0", "1,000.0", "200.00", "20.00", "20.00-32.00"]


def test_one_model_alone_has_no_ratios() -> None:
    table = speed_table([Outcome(Case(100, 6, 4), {"model": OURS})], {"model": WEIGHTS["dense"]})
    assert "×" not in table and "same" not in table and "400.00" in table


def test_memory_is_the_largest_peak() -> None:
    more = Outcome(Case(1, 2, 1), {"compressed": Timing([1.0], [1.0], 300_000_000), "dense": OTHER}, same=(1, 2))
    lines = memory_table([OUTCOME, more], WEIGHTS).splitlines()
    assert lines[2].split() == ["compressed", "9.0", "MB", "8.0", "MB", "300.0", "MB"]
    assert lines[3].split() == ["dense", "15.0", "MB", "14.0", "MB", "200.0", "MB"]


def test_cases_that_are_left_out_are_named() -> None:
    skipped = Outcome(Case(1024, 1024, 16), reason="left out: too long")
    assert left_out([OUTCOME, skipped]) == ["1,024/1,024 batch 16: left out: too long"]


def test_percentiles_are_linear() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Spread(2.0, 3.5, 5.0)
