"""The file of results: what a later run may continue."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ast_sparse.errors import UserError
from ast_sparse.speed.cases import Case
from ast_sparse.speed.comparison import Comparison, find_comparison
from ast_sparse.speed.machine import machine
from ast_sparse.speed.outcomes import Outcome
from ast_sparse.speed.results_file import read_results, record
from ast_sparse.speed.turns import measure
from tests.speed.sides import Scripted, write_exports

MACHINE = machine()
CASES = [Case(8, 20, 1), Case(8, 20, 4)]


def comparison(folder: Path, **settings: Any) -> Comparison:
    return find_comparison(folder / "compressed", **{"cases": CASES, "repeats": 1, **settings})


@pytest.fixture
def written(exports: Path, tmp_path: Path) -> tuple[Path, list[Outcome]]:
    start = Scripted.reset()
    start.fails = {("begin", 4)}
    outcomes = measure(comparison(exports), progress=False, start=start)
    content = record(comparison(exports), outcomes, MACHINE)
    (tmp_path / "speed.json").write_text(json.dumps(content))
    return tmp_path / "speed.json", outcomes


def test_a_file_holds_everything(written: tuple[Path, list[Outcome]], exports: Path) -> None:
    content = json.loads(written[0].read_text())
    assert content.keys() == {"settings", "machine", "notes", "weights", "bound", "cases"}
    assert content["machine"].keys() >= {"cpu", "versions", "threads"} and content["bound"] > 1
    assert read_results(written[0], comparison(exports)) == (written[1], content["machine"])


def test_more_cases_continue_it_and_no_file_is_a_fresh_start(
    written: tuple[Path, list[Outcome]], exports: Path, tmp_path: Path
) -> None:
    assert read_results(written[0], comparison(exports, cases=[Case(4, 4, 2)]))[0] == written[1]
    assert read_results(tmp_path / "none.json", comparison(exports)) == ([], {})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dtype": "bfloat16"}, "--dtype='float32', now 'bfloat16'"),
        ({"repeats": 2}, "--repeats=1, now 2"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], expected: str, written: tuple[Path, list[Outcome]], exports: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read_results(written[0], comparison(exports, **change))
    assert expected in str(caught.value) and "start anew with --overwrite" in str(caught.value)


def test_another_model_and_another_machine_are_refused(
    written: tuple[Path, list[Outcome]], exports: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds results with --against=null, now '.*dense'"):
        read_results(written[0], find_comparison(exports / "compressed", exports / "dense", cases=CASES, repeats=1))
    with pytest.raises(UserError, match="holds results with MODEL='"):
        read_results(written[0], comparison(write_exports(tmp_path)))
    content = json.loads(written[0].read_text())
    content["machine"]["cpu"] = "abacus"
    written[0].write_text(json.dumps(content))
    with pytest.raises(UserError, match="holds results with cpu='abacus'"):
        read_results(written[0], comparison(exports))


@pytest.mark.parametrize("variable", ["AST_SPARSE_CPU", "AST_SPARSE_GPU"])
def test_other_code_paths_are_refused(
    variable: str, written: tuple[Path, list[Outcome]], exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "plain")
    with pytest.raises(UserError, match=f"holds results with {variable}='auto', now 'plain'"):
        read_results(written[0], comparison(exports))


def test_another_number_of_threads_of_torch_is_refused(written: tuple[Path, list[Outcome]], exports: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(UserError, match=f"--threads={before}, now {before + 1}"):
            read_results(written[0], comparison(exports))
    finally:
        torch.set_num_threads(before)


def test_a_model_whose_files_have_changed_is_refused(tmp_path: Path) -> None:
    folder = write_exports(tmp_path)
    before = comparison(folder)
    (tmp_path / "speed.json").write_text(json.dumps(record(before, [], MACHINE)))
    weights = folder / "compressed" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(UserError, match=r"holds results with MODEL \(its files have changed\)"):
        read_results(tmp_path / "speed.json", comparison(folder))


@pytest.mark.parametrize("text", ["{}", '{"settings": {}, "machine": {}, "cases": [{}]}', '{"settings": 1}'])
def test_another_file_is_refused(text: str, exports: Path, tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text(text)
    with pytest.raises(UserError, match="is not a file of ast-bench"):
        read_results(tmp_path / "speed.json", comparison(exports))
