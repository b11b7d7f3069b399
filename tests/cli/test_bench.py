"""ast-bench as a user calls it. Models run in this process; `tests/speed/test_side.py` starts real ones."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ast_sparse.cli import bench
from ast_sparse.cli.bench import main
from ast_sparse.speed import turns
from ast_sparse.speed.machine import machine
from ast_sparse.speed.side import InProcess
from tests.models import save_tiny_model
from tests.speed import sides
from tests.speed.sides import Scripted, write_exports

SHORT = ("--lengths", "6/4,5/3", "--batch", "1,2", "--repeats", 1)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exports(tmp_path_factory.mktemp("exports"))


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "Process", InProcess)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_line(result: Result) -> str:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if "%" not in line and line]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


def rows(result: Result) -> list[list[str]]:
    """The cells of the table of speeds."""
    found = [line.split() for line in result.stdout.splitlines()]
    return [cells for cells in found if len(cells) > 7 and cells[2] in ("compressed", "dense")]


def test_it_prints_both_models_and_writes_the_files(exports: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "speed.json", "--plot", tmp_path / "speed.png")
    result = run(exports / "compressed", *SHORT, *files)
    assert result.exit_code == 0, result.output
    assert [row[:3] for row in rows(result)] == [
        [lengths, batch, side] for lengths in ("6/4", "5/3") for batch in "12" for side in ("compressed", "dense")
    ]
    assert "8 of 8" in result.stdout and "transformers, float32, 1 repeat," in result.stdout
    assert "dense: the same export, decoded in memory, with the same zeros." in result.stdout
    content = json.loads((tmp_path / "speed.json").read_text())
    assert len(content["cases"]) == 4 and content["cases"][0]["same"] == [4, 4]
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_another_dense_model_and_no_other_model(exports: Path) -> None:
    result = run(exports / "compressed", "--against", exports / "dense", "--lengths", "4/3", "--batch", 1)
    assert result.exit_code == 0 and f"dense: {exports / 'dense'}" in result.stdout
    result = run(exports / "dense", "--lengths", "4/3", "--batch", 1)
    assert result.exit_code == 0 and "it is measured alone" in result.stdout and "×" not in result.stdout


def test_a_second_call_continues_the_file(exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (exports / "compressed", "--batch", "1", "--repeats", 1, "--json", tmp_path / "speed.json")
    monkeypatch.setattr(turns, "Process", Scripted.reset())
    assert run(*arguments, "--lengths", "6/4").exit_code == 0
    before = len(Scripted.calls)
    result = run(*arguments, "--lengths", "6/4,5/3")
    assert result.exit_code == 0 and "1 case of an earlier run" in result.stderr
    assert len(rows(result)) == 4 and len(Scripted.calls) == 2 * before
    assert "--repeats=1, now 2" in error_line(run(*arguments, "--lengths", "6/4", "--repeats", 2))
    result = run(*arguments, "--lengths", "6/4", "--repeats", 2, "--overwrite")
    assert result.exit_code == 0 and len(rows(result)) == 2
    assert len(json.loads((tmp_path / "speed.json").read_text())["cases"]) == 1


def test_a_file_of_another_gpu_is_not_continued(exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "speed.json"
    monkeypatch.setattr(turns, "Process", Scripted.reset())
    arguments = (exports / "compressed", "--batch", "1", "--repeats", 1, "--json", file)
    here = machine()
    for gpu, lengths, code in (("A", "6/4", 0), ("B", "6/4,5/3", 2), ("A", "6/4,5/3", 0)):
        monkeypatch.setattr(sides, "machine", lambda gpu=gpu: {**here, "gpu": gpu})
        before = file.read_text() if file.is_file() else ""
        result = run(*arguments, "--lengths", lengths)
        assert result.exit_code == code, result.output
        assert (file.read_text() == before) == (code == 2)
        assert code == 0 or "holds results with gpu='A', now 'B'. Name another file" in result.stderr


def test_a_failure_leaves_the_other_cases_and_is_the_last_line(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "Process", Scripted.reset())
    Scripted.fails = {("begin", 2)}
    result = run(exports / "compressed", *SHORT, "--json", tmp_path / "speed.json")
    line = error_line(result)
    assert line == "Error: 2 of 4 cases failed; 6/4 batch 2: failed: compressed: no memory is left"
    assert len(rows(result)) == 4 and "5/3 batch 2: failed" in result.stdout
    asked_less = (*SHORT, "--batch", "1", "--json", tmp_path / "speed.json")
    assert run(exports / "compressed", *asked_less).exit_code == 0  # failures of an earlier run are not of this one
    Scripted.fails = set()
    result = run(exports / "compressed", *SHORT, "--json", tmp_path / "speed.json")
    assert result.exit_code == 0 and len(rows(result)) == 8


def test_ctrl_c_shows_what_there_is_and_names_the_rest(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Scripted):
        def answer(self) -> Any:
            if self._case.prompt == 5:
                raise KeyboardInterrupt
            return super().answer()

    monkeypatch.setattr(turns, "Process", Interrupted.reset())
    result = run(exports / "compressed", *SHORT, "--json", tmp_path / "speed.json")
    assert result.exit_code == 130 and result.stderr.endswith("Error: interrupted.\n")
    assert len(rows(result)) == 4 and "5/3 batch 1: not measured\n5/3 batch 2: not measured" in result.stdout
    assert len(json.loads((tmp_path / "speed.json").read_text())["cases"]) == 2


def test_a_limit_of_time_names_what_it_leaves_out(exports: Path) -> None:
    result = run(exports / "compressed", *SHORT, "--max-minutes", 1e-9)
    assert result.exit_code == 0
    assert result.stdout.count("left out: needs 0.0 minutes or more, and 0.0 of --max-minutes are left") == 4


ERRORS: dict[str, tuple[tuple[object, ...], str]] = {
    "no folder": (("NONE",), "is not a folder"),
    "no model": (("EMPTY",), "holds no config.json"),
    "vocabulary": (("MODEL", "--against", "OTHER", *SHORT), "one of 130. Compare models with the same tokens"),
    "positions": (("MODEL", "--lengths", "100/29"), "makes 129 tokens, but"),
    "lengths": (("MODEL", "--lengths", "100"), "--lengths='100' is not of the form PROMPT/NEW"),
    "batch": (("MODEL", "--batch", "0"), "--batch='0' is not a list of whole numbers"),
    "json": (("MODEL", *SHORT, "--json", "NONE/speed.json"), "does not exist. Create it first."),
    "plot folder": (("MODEL", *SHORT, "--plot", "NONE/speed.png"), "does not exist. Create it first."),
    "plot name": (("MODEL", *SHORT, "--plot", "speed.pdf"), "does not end in .png"),
    "cuda": (("MODEL", *SHORT, "--device", "cuda"), "--device cuda cannot be used"),
    "device": (("MODEL", *SHORT, "--engine", "vllm", "--device", "cpu"), "--device has no effect with --engine vllm"),
    "eager": (("MODEL", *SHORT, "--enforce-eager"), "--enforce-eager has no effect without --engine vllm"),
    "overwrite": (("MODEL", *SHORT, "--overwrite"), "--overwrite has no effect without --json"),
    "repeats": (("MODEL", "--repeats", "0"), "'--repeats': 0 is not in the range"),
    "minutes": (("MODEL", "--max-minutes", "0"), "'--max-minutes': 0.0 is not in the range"),
    "engine": (("MODEL", "--engine", "sglang"), "'sglang' is not one of 'transformers', 'vllm'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_call_is_one_line_and_leaves_nothing_behind(case: str, exports: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = json.loads((save_tiny_model(tmp_path / "other") / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 130}))
    places = {"MODEL": exports / "compressed", "EMPTY": tmp_path / "empty", "OTHER": tmp_path / "other"}
    arguments, expected = ERRORS[case]
    given = [places.get(str(each), str(each).replace("NONE", str(tmp_path / "none"))) for each in arguments]
    before = sorted(tmp_path.rglob("*"))
    assert expected in error_line(run(*given))
    assert sorted(tmp_path.rglob("*")) == before


def missing(name: str) -> Callable[..., object]:
    find = importlib.util.find_spec
    return lambda wanted, *rest: None if wanted == name else find(wanted, *rest)


def test_missing_packages_are_named_before_anything_is_measured(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "find_spec", missing("matplotlib"))
    line = error_line(run(exports / "compressed", *SHORT, "--plot", tmp_path / "speed.png"))
    assert "pip install 'ast-sparse[plots]'" in line
    monkeypatch.setattr("ast_sparse.speed.comparison.find_spec", missing("vllm"))
    assert "pip install vllm" in error_line(run(exports / "compressed", *SHORT, "--engine", "vllm"))
