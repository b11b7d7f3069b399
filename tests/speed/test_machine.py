"""What a measurement depends on."""

import platform
import subprocess
from pathlib import Path

import pytest
import torch

from ast_sparse.errors import UserError
from ast_sparse.speed import machine as room
from ast_sparse.speed.machine import cpu_name, machine, machine_line


def test_the_machine_is_named_on_one_line() -> None:
    found = machine()
    line = machine_line(found)
    assert "\n" not in line and cpu_name() in line and torch.__version__ in line
    assert found["threads"] == torch.get_num_threads() and f"{found['threads']} thread" in line


def test_without_proc_the_architecture_stands_for_the_cpu() -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    before, Path.read_text = Path.read_text, missing  # type: ignore[method-assign, assignment]
    try:
        assert cpu_name() == (platform.processor() or platform.machine())
    finally:
        Path.read_text = before  # type: ignore[method-assign]


def test_the_environment_and_the_c_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AST_SPARSE_GPU", "fixed")
    monkeypatch.setattr(room, "kernels", lambda: None)
    found = machine()
    assert found["AST_SPARSE_GPU"] == "fixed" and "C kernels: none" in machine_line(found)
    monkeypatch.setenv("AST_SPARSE_CPU", "abacus")
    with pytest.raises(UserError, match="AST_SPARSE_CPU is 'abacus'"):
        machine()


def test_a_changed_package_is_said_beside_its_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    code, other = tmp_path / "ast_sparse" / "code.py", tmp_path / "other.py"
    code.parent.mkdir()
    assert room._commit(code.parent) is None
    for arguments in (("init",), ("add", "."), ("commit", "-m", "first")):
        code.write_text("1\n")
        other.write_text("1\n")
        git(*arguments)
    other.write_text("2\n")
    commit = room._commit(code.parent)
    assert commit is not None and commit.isalnum()
    code.write_text("2\n")
    assert room._commit(code.parent) == f"{commit}+changes"
