"""Compiled and eager kernels train the same model; a resumed run continues with the kernels it began with."""

import json
from pathlib import Path

import pytest
import torch

from ast_sparse import DistillationConfig, SparseTrainer, SparsityConfig
from tests.models import tiny_model
from tests.training.small_runs import arguments, blocks


def run(folder: Path, kernels: str, resume: str | None = None, steps: int = 20) -> SparseTrainer:
    trainer = SparseTrainer(
        tiny_model("llama"),
        arguments(folder, max_steps=steps, save_strategy="steps", save_steps=10, weight_decay=0.1),
        sparsity_config=SparsityConfig(mask_interval=4, mask_decay=1e-2, kernels=kernels),
        distillation_config=DistillationConfig(alpha=0.67),
        train_dataset=blocks(count=16),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_twenty_steps_of_compiled_kernels_are_those_of_eager_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eager, compiled = (run(tmp_path / kernels, kernels) for kernels in ("eager", "compiled"))
    expected = eager.model.state_dict()
    for name, tensor in compiled.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(tensor, expected[name]), name  # masks
    history = [(tmp_path / kernels / "mask_history.jsonl").read_text() for kernels in ("eager", "compiled")]
    assert history[0] == history[1] and '"flip_rate": 0.0,' not in history[0]

    checkpoint = tmp_path / "compiled" / "checkpoint-10"
    assert json.loads((checkpoint / "sparsity_config.json").read_text())["kernels"] == "compiled"
    resumed = run(tmp_path / "resumed", "auto", str(checkpoint))  # as in the checkpoint, though small
    whole = compiled.model.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.model.state_dict().items())
    assert "trained with" not in caplog.text
    run(tmp_path / "changed", "eager", str(checkpoint), steps=11)
    assert "trained with compiled kernels, this run continues with eager ones" in caplog.text
