"""ast-export as a user calls it, and the errors every command shares."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from ast_sparse.cli.command import Command
from ast_sparse.cli.export import main
from ast_sparse.errors import UserError
from ast_sparse.export.files import read_json
from ast_sparse.loading import load_causal_lm, load_tokenizer
from tests.export.sparse_models import save_training_checkpoint, sparse_model
from tests.models import save_tiny_model


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
    assert "is no folder" in error_line(run(tmp_path / "nowhere", out))
    assert "not 2:4" in error_line(run(dense, out))
    assert "sparsity.pattern='2' is not of the form N:M" in error_line(run(checkpoint, out, "--pattern", "2"))
    assert "'zip' is not one of 'dense', 'compressed'" in error_line(run(checkpoint, out, "--format", "zip"))
    assert "Missing argument 'OUT'" in error_line(run(checkpoint))
    assert "--colour" in error_line(run(checkpoint, out, "--colour"))
    assert not out.exists()


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
