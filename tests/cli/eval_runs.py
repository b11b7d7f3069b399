"""How tests call ast-eval, and read what it prints."""

from pathlib import Path

from click.testing import CliRunner, Result

from ast_sparse.cli.eval import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.rstrip("\n").splitlines()[-1]


def table(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.output
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.stdout.splitlines()]
