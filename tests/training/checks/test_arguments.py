"""What a run's arguments set for the whole process: early enough, and no more than was asked for."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.import_utils import enable_tf32

from ast_sparse.storage.origin import settings_kept
from ast_sparse.training.checks.arguments import build_arguments
from tests.models import tiny_model


def test_full_determinism_is_prepared_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    build_arguments({"full_determinism": True, "use_cpu": True, "report_to": "none"}, str(tmp_path))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("asked", "expected"), [({}, "ieee"), ({"tf32": True}, "tf32")])
def test_compiled_training_turns_tf32_on_only_if_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")  # and restored
    enable_tf32.cache_clear()
    build_arguments({"torch_compile": True, "use_cpu": True, "report_to": "none", **asked}, str(tmp_path))
    assert torch.backends.fp32_precision == expected
    enable_tf32.cache_clear()


def test_a_trainer_leaves_tf32_off() -> None:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with settings_kept(tiny_model()):
        matmul.allow_tf32 = True  # as accelerate does for a compiled run in float32 on a GPU
    assert matmul.fp32_precision == before != "tf32" and not matmul.allow_tf32
