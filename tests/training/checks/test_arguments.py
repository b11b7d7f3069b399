"""What a run's arguments set for the whole process: early enough, and no more than was asked for."""

import os
from pathlib import Path

import pytest

from ast_sparse.training.checks.arguments import build_arguments


def test_full_determinism_is_prepared_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    build_arguments({"full_determinism": True, "use_cpu": True, "report_to": "none"}, str(tmp_path))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
