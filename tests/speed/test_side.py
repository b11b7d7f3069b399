"""A model in a process of its own: the answers, its last words, and its end."""

import sys
from pathlib import Path

import pytest

from ast_sparse.errors import UserError
from ast_sparse.speed.cases import Case
from ast_sparse.speed.side import InProcess, Process, SideFailed, SideSpec
from tests.models import VOCAB

CASE = Case(4, 3, 2)


def spec(folder: Path) -> SideSpec:
    return SideSpec(
        engine="transformers", folder=str(folder), compressed=True, dtype="float32", threads=1, vocabulary=VOCAB
    )


def test_a_process_answers_and_ends(exports: Path) -> None:
    side = Process(spec(exports / "compressed"), [CASE])
    try:
        assert side.answer()["threads"] == 1
        side.ask("begin", case=[4, 3, 2])
        assert side.answer() > 0
        side.ask("advance", steps=2)
        assert side.answer() > 0
        side.ask("finish")
        assert [len(row) for row in side.answer()["tokens"]] == [3, 3]
    finally:
        side.close()
    with pytest.raises(ValueError, match="closed file"):
        side.ask("finish")


def test_its_last_words_are_passed_on(exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho first >&2\necho out of memory >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    side = Process(spec(exports / "compressed"), [CASE])
    with pytest.raises(SideFailed, match="its process ended with code 3: out of memory"):
        side.answer()
    side.ask("finish")  # nobody listens
    side.close()


def test_faults_of_the_user_stay_what_they_are(exports: Path, tmp_path: Path) -> None:
    side = InProcess(spec(tmp_path), [CASE])
    with pytest.raises(UserError, match=r"holds no config\.json"):
        side.answer()
    side = InProcess(spec(exports / "compressed"), [CASE])
    side.ask("begin", case=[4, 3])
    with pytest.raises(SideFailed, match="missing 1 required positional argument"):
        side.answer()
