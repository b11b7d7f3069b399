"""ast-export as a user calls it, and the errors every command shares."""

from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from ast_sparse.cli.command import Command
from ast_sparse.cli.export import main
from ast_sparse.errors import UserError
from ast_sparse.storage.files import read_json
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.locate import load_tokenizer
from tests.export.sparse_models import save_training_checkpoint, sparse_model
from tests.models import generated_text, save_tiny_model


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_line(result: Result) -> str:
    """The one line a failed command prints, after checking that it is one."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if "%|" not in line and line]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_training_checkpoint(sparse_model(), tmp_path / "checkpoint")


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_export_prints_the_table_and_loads(format: str, checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, tmp_path / "out", "--format", format)
    assert result.exit_code == 0, result.output
    ratio = "0.5625" if format == "compressed" else "1.0000"
    row = next(line for line in result.stdout.splitlines() if line.startswith("pruned (2:4)"))
    assert row.split()[2] == "14" and row.endswith(ratio)
    assert f"Wrote {tmp_path / 'out'}" in result.stdout
    load_causal_lm(tmp_path / "out")
    load_tokenizer(tmp_path / "out")


def test_4_bit_export_is_calibrated_or_rounded_as_asked(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(generated_text())
    common = ("--format", "compressed-int4", "--dtype", "float32")
    options = ("--calibration", text, "--samples", 4, "--seq-len", 16, "--device", "cpu", "--seed", 3, "--bos", "none")
    result = run(checkpoint, tmp_path / "awq", *common, *options)
    assert result.exit_code == 0, result.output
    assert "AWQ on 4 sequences" in result.stdout and "14 of 14 layers scaled" in result.stdout
    assert "the paper's formula, without scales: 2.750" in result.stdout
    result = run(checkpoint, tmp_path / "near", *common, "--calibration", "none")
    assert result.exit_code == 0, result.output
    assert "rounded to the nearest step, without calibration text" in result.stdout
    first, second = (load_causal_lm(tmp_path / name).state_dict() for name in ("awq", "near"))
    norm = "model.layers.0.input_layernorm.weight"  # the scales changed it
    assert first.keys() == second.keys() and not torch.equal(first[norm], second[norm])


# arguments after MODEL OUT -> what the one line says
ROUNDING_ERRORS = {
    "no-text": ((), "needs text to calibrate on. Give --calibration FILE, or --calibration none"),
    "both": (("--calibration", "none", "--calibration", "TEXT"), "--calibration names none and"),
    "missing": (("--calibration", "no.txt"), "no.txt"),
    "samples": (("--calibration", "TEXT", "--samples", "0"), "--samples=0 must be at least 1"),
    "too-many": (("--calibration", "TEXT", "--samples", "99999", "--seq-len", "8"), "--samples=99999"),
    "length": (("--calibration", "TEXT", "--seq-len", "4096"), "--seq-len=4096 is longer than the model's 128"),
    "alone": (("--calibration", "none", "--seed", "1"), "--seed (1) has no effect without --calibration FILE"),
    "format": (("--format", "dense", "--calibration", "TEXT"), "has no effect without --format compressed-int4"),
    "device": (("--calibration", "TEXT", "--device", "tpu0"), "--device tpu0 cannot be used"),
}


@pytest.mark.parametrize("case", ROUNDING_ERRORS)
def test_wrong_calibration_is_one_line_and_leaves_nothing_behind(case: str, checkpoint: Path, tmp_path: Path) -> None:
    given, expected = ROUNDING_ERRORS[case]
    text = tmp_path / "text.txt"
    text.write_text(generated_text(40))
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(text) if part == "TEXT" else part for part in given]
    assert expected in error_line(run(checkpoint, tmp_path / "out", "--format", "compressed-int4", *arguments))
    assert sorted(tmp_path.rglob("*")) == before


def test_export_says_how_vllm_serves_slorb(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_slorb = save_training_checkpoint(sparse_model(slorb_k=8), tmp_path / "slorb")
    assert "SLoRB has rank" not in run(checkpoint, tmp_path / "plain").stdout
    printed = run(with_slorb, tmp_path / "out").stdout.splitlines()
    adapter = tmp_path / "out" / "slorb"
    assert printed[-2] == (f"SLoRB has rank 6; in vLLM: --enable-lora --max-lora-rank 8 --lora-modules slorb={adapter}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "slorb=" + str(tmp_path / "home" / "slorb") in run(with_slorb, "~/home").stdout


def test_options_reach_the_export(tmp_path: Path) -> None:
    model = sparse_model(pattern="4:8")
    source = save_training_checkpoint(model, tmp_path / "checkpoint")
    arguments = (source, tmp_path / "out", "--format", "dense", "--dtype", "float16", "--pattern", "4:8")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "float16"
    assert "is not empty" in error_line(run(*arguments))
    assert run(*arguments, "--overwrite").exit_code == 0


def test_errors_of_the_user_are_one_line_and_exit_with_two(checkpoint: Path, tmp_path: Path) -> None:
    dense = save_tiny_model(tmp_path / "dense")
    out = tmp_path / "out"
    assert "is not a folder" in error_line(run(tmp_path / "nowhere", out))
    assert "not 2:4" in error_line(run(dense, out))
    assert "--pattern='2' is not of the form N:M" in error_line(run(checkpoint, out, "--pattern", "2"))
    assert "'zip' is not one of 'dense', 'compressed'" in error_line(run(checkpoint, out, "--format", "zip"))
    assert "Missing argument 'OUT'" in error_line(run(checkpoint))
    assert "--colour" in error_line(run(checkpoint, out, "--colour"))
    assert not out.exists()


def test_table_alone_prints_and_writes_figures_but_no_model(checkpoint: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run(checkpoint, "--table", "--json", tmp_path / "table.json")
    assert result.exit_code == 0, result.output
    assert "The model is 2:4" in result.stdout and "which is 4:8, 8:16, 16:32 too" in result.stdout
    assert "8.594%" in result.stdout and "limit is 9.375%" in result.stdout
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "table.json"])
    record = read_json(tmp_path / "table.json")
    assert record["model"] == str(checkpoint) and record["own"] == "2:4" and record["value_bits"] == 4
    rows = {row["pattern"]: row for row in record["rows"]}
    assert list(rows) == ["1:2", "2:4", "4:8", "8:16", "16:32"]
    assert rows["2:4"]["share_of_float32"]["combinatorial"] == 0.0859375 and rows["2:4"]["used"] == 6
    assert rows["16:32"]["layers"] == 12 and rows["2:4"]["layers"] == 14  # in_features 48 is not a multiple of 32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_table_of_checkpoint_and_exports_counts_the_same_masks(family: str, tmp_path: Path) -> None:
    source = save_training_checkpoint(sparse_model(family), tmp_path / "checkpoint")
    figures = []
    for name in ("checkpoint", "dense", "compressed"):
        if name != "checkpoint":
            assert run(source, tmp_path / name, "--format", name).exit_code == 0
        result = run(tmp_path / name, "--table", "--json", tmp_path / "table.json")
        assert result.exit_code == 0, result.output
        figures.append([row for row in read_json(tmp_path / "table.json")["rows"] if row["own"]])
    assert len(figures[0]) == 4 and figures[0] == figures[1] == figures[2]


def test_table_of_a_dense_model_says_so(tmp_path: Path) -> None:
    result = run(save_tiny_model(tmp_path / "dense"), "--table", "--value-bits", "16")
    assert result.exit_code == 0, result.output
    assert "The model is dense: masks that magnitude would choose" in result.stdout
    assert "values counted at 16 bits" in result.stdout and " own " not in result.stdout


def test_table_beside_an_export(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, tmp_path / "out", "--table")
    assert result.exit_code == 0, result.output
    assert "The model is 2:4" in result.stdout and f"Wrote {tmp_path / 'out'}" in result.stdout
    load_causal_lm(tmp_path / "out")


# arguments after MODEL -> what the one line says
TABLE_ERRORS = {
    "bits": (("--table", "--value-bits", "0"), "Invalid value for '--value-bits': 0 is not in the range 1<=x<=32"),
    "bits-form": (("--table", "--value-bits", "four"), "'--value-bits': 'four' is not a valid integer"),
    "bits-alone": (("OUT", "--value-bits", "8"), "--value-bits (8) has no effect without --table"),
    "json-alone": (("OUT", "--json", "table.json"), "--json (table.json) has no effect without --table"),
    "format": (("--table", "--format", "dense"), "--format (dense) has no effect without OUT"),
    "json-folder": (("--table", "--json", "NONE/table.json"), "does not exist. Create it first."),
    "pattern": (("--table", "--pattern", "1:4"), "up to 32:64, but the model's is 1:4"),
    "pattern-form": (("--table", "--pattern", "2"), "--pattern='2' is not of the form N:M"),
    "fit": (("--table", "--pattern", "1:2"), "is not 1:2. Name the model's pattern with --pattern"),
    "taken": (("MODEL", "--table", "--json", "FILE"), "holds the checkpoint that is being exported"),
}


@pytest.mark.parametrize("case", TABLE_ERRORS)
def test_wrong_table_is_one_line_and_leaves_nothing_behind(case: str, checkpoint: Path, tmp_path: Path) -> None:
    given, expected = TABLE_ERRORS[case]
    before = sorted(tmp_path.rglob("*"))
    names = {
        "OUT": tmp_path / "out", "MODEL": checkpoint, "FILE": tmp_path / "table.json",
        "NONE/table.json": tmp_path / "none" / "table.json",
    }  # fmt: skip
    assert expected in error_line(run(checkpoint, *(names.get(part, part) for part in given)))
    assert sorted(tmp_path.rglob("*")) == before


def _command(error: BaseException) -> click.Command:
    @click.command(cls=Command)
    def command() -> None:
        raise error

    return command


def test_ctrl_c_exits_with_130() -> None:
    assert CliRunner().invoke(_command(KeyboardInterrupt()), []).exit_code == 130


def test_error_of_many_lines_becomes_one() -> None:
    result = CliRunner().invoke(_command(UserError("first\n  second")), [])
    assert error_line(result) == "Error: first second"


def test_faults_of_the_program_keep_their_traceback() -> None:
    result = CliRunner().invoke(_command(RuntimeError("a fault")), [])
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)
