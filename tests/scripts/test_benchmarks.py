"""scripts/benchmarks: every file runs, and a goal is met if the 20th percentile meets it."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from ast_sparse.kernels import moments8bit
from scripts.benchmarks import optimizer_step, reference_step
from scripts.benchmarks.harness import PeakMemory, Result, Settings, Spread, interleave, table
from scripts.benchmarks.harness import main as command_line
from scripts.benchmarks.run import main as run_all
from scripts.benchmarks.step_profile import main
from scripts.checks import gpu
from scripts.provenance import provenance
from tests.processes import forked_commands

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmarks"
NAMES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"run", "harness", "step_profile", "loading"})


@pytest.fixture(scope="module", autouse=True)
def fast_processes() -> Iterator[None]:
    """What the scripts start is a fork of a process that has imported torch."""
    with forked_commands():
        yield


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_measures_in_its_quick_form(name: str) -> None:
    results = list(import_module(f"scripts.benchmarks.{name}").measure(Settings(quick=True)))
    assert results and all((result.ratio is None) == bool(result.reason) for result in results)
    assert all(result.verdict in table(results) for result in results)


def test_the_profile_shows_the_operations_of_both_sides() -> None:
    shown = CliRunner().invoke(main, ["tiny", "--rows", "400"])
    assert shown.exit_code == 0, shown.output
    ours, plain = shown.stdout.split("plain loop, tiny")
    assert all("aten::mm" in side and "aten::_fused_adamw_" in side for side in (ours, plain))
    assert "aten::normal_" not in plain  # the weights of its teacher are drawn before


def test_run_writes_what_the_table_shows(tmp_path: Path) -> None:
    lines = tmp_path / "results.jsonl"
    run = CliRunner().invoke(run_all, ["matrix_product", "--quick", "--out", str(lines)])
    assert run.exit_code == 0, run.stderr
    results = [json.loads(line) for line in lines.read_text().splitlines()]
    assert results
    for result in results:
        assert result.keys() >= {"ratio", "commit", "device", "versions", "threads"}
        assert result["case"] in run.stdout and result["verdict"] in run.stdout


def test_a_goal_holds_when_the_20th_percentile_meets_it() -> None:
    about = dict(question="q", case="c", against="x")
    ours, alternative = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0] * 6
    assert Result.of(ours, alternative, **about).ratio == Spread(1.0, 1.75, 2.5)
    assert Result.of(ours, alternative, **about).row()[-1] == "1.750 (1.000-2.500)"
    assert Result.of([-1.0], [4.0], **about).row()[-1] == "-0.250"  # a count
    assert Result.of(ours, alternative, goal=1.0, **about).verdict == "met: <= 1"
    assert Result.of(ours, alternative, goal=0.9, **about).verdict == "missed: <= 0.9"
    assert Result(reason="no GPU", **about).verdict == "not applicable: no GPU"


def test_sides_take_turns_after_the_warm_up() -> None:
    calls: list[str] = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, pairs=4, warmup=1)
    assert "".join(calls) == "abbaabbaab" and len(times["a"]) == len(times["b"]) == 4


def test_peak_memory_sees_what_is_freed_again() -> None:
    with PeakMemory() as peak:
        block = bytearray(50_000_000)
        del block
    assert 45e6 < peak.above < 60e6 < peak.total


def test_a_child_that_is_killed_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: fork)
    assert Settings().in_child(abs, -1) == 1
    with pytest.raises(BrokenProcessPool):
        Settings().in_child(os._exit, 1)


def test_results_that_were_written_are_no_change_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    results, code = tmp_path / "scripts/benchmarks/results/a.jsonl", tmp_path / "code.py"
    results.parent.mkdir(parents=True)
    for file in (results, code):
        file.write_text("1\n")
    for arguments in (("init",), ("add", "."), ("commit", "-m", "first")):
        git(*arguments)
    results.write_text("2\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    recorders = (lambda: provenance(tmp_path), lambda: gpu.about(None, True))
    assert all(record()["commit"].isalnum() for record in recorders)
    code.write_text("2\n")
    assert all(record()["commit"].endswith("+changes") for record in recorders)


def test_without_torchao_its_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments8bit, "is_installed", lambda: False)
    results = list(optimizer_step.measure_states(Settings(quick=True), "eager"))
    assert [bool(result.reason) for result in results] == [False, True]
    assert results[1].verdict == "not applicable: torchao is not installed (extra 8bit)"


def test_an_error_leaves_the_rows_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(settings: Settings) -> Iterator[Result]:
        yield Result(question="q", case="first", against="x", reason="no GPU")
        raise ValueError("broken")

    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", "--out", str(tmp_path / "lines.jsonl")])
    with pytest.raises(ValueError, match="broken"):
        command_line(measure)
    assert [json.loads(line)["case"] for line in (tmp_path / "lines.jsonl").read_text().splitlines()] == ["first"]


def test_a_reference_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["reference_step.py", "--quick", "--reference", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        command_line(reference_step.measure)
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert f"--reference {tmp_path} has no file adamw.py." in shown and "Traceback" not in shown
