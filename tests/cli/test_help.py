"""`--help` answers at once: it does not import the packages that take seconds."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ast_sparse.cli import bench, data, eval, export, prune, train
from tests.processes import run_python

COMMANDS = {
    "train": train.main, "prune": prune.main, "eval": eval.main, "export": export.main, "data prepare": data.prepare,
    "bench": bench.main,
}  # fmt: skip
ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from ast_sparse.cli.{module} import main
try:
    main([*{below}, "--help"])
finally:
    print("loaded:", [name for name in ("torch", "transformers", "datasets", "numpy") if name in sys.modules])
"""

FAULTY = """
import sys
from ast_sparse.cli.train import main
try:
    main(["--config", "absent.yaml"])
except SystemExit as end:
    print(end.code, [name for name in ("transformers", "datasets", "ast_sparse.run.train") if name in sys.modules])
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_without_heavy_imports(name: str) -> None:
    module, *below = name.split()
    program = PROGRAM.format(module=module, below=below)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("loaded: []")
    options = [parameter for parameter in COMMANDS[name].params if isinstance(parameter, click.Option)]
    assert options and all(option.help for option in options)
    assert all(option.opts[0] in done.stdout for option in options)


def test_a_configuration_that_is_not_there_is_refused_without_heavy_imports() -> None:
    done = run_python(FAULTY)
    assert done.stdout == "2 []\n" and "'absent.yaml' does not exist" in done.stderr


def test_help_says_which_sections_are_off_unless_they_are_there() -> None:
    lines = str(train.main.epilog).splitlines()
    assert [line.split(".*")[0].strip() for line in lines if ".*: off unless" in line] == ["slorb", "basis"]


def test_the_wheel_is_tried_with_every_command() -> None:
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    script = (ROOT / "scripts" / "checks" / "wheel.sh").read_text(encoding="utf-8")
    (tried,) = re.findall(r"^for command in ([a-z ]+); do$", script, re.MULTILINE)
    assert {f"ast-{name}" for name in tried.split()} == set(commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_only_training_runs_in_the_processes_of_a_launcher(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("ast_sparse.cli.command._PRINT_S", 0)
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    done = CliRunner().invoke(COMMANDS[name], ["--help"])
    if name == "train":
        assert done.exit_code == 0
    else:
        assert done.exit_code == 2 and "runs in one process, but a launcher started 2. Start it" in done.stderr
    monkeypatch.delenv("LOCAL_RANK")  # some clusters set the others for every command
    assert CliRunner().invoke(COMMANDS[name], ["--help"]).exit_code == 0
