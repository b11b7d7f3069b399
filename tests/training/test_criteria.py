"""One-shot starts and activation criteria inside a training run (paper Table 13)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from ast_sparse import CalibrationConfig, SLoRBConfig, SparsityConfig, UserError
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.sparsity.statistics import InputRecorder
from tests.models import tiny_model
from tests.training.small_runs import blocks, count_passes, trainer, weights

CALIBRATION = CalibrationConfig(samples=4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["wanda", "sparsegpt"])
def test_the_first_refresh_flips_few_of_a_one_shot_start(tmp_path: Path, family: str, init: str) -> None:
    sparsity = SparsityConfig(init=init, mask_interval=5, mask_decay=1e-4)
    run = trainer(
        tmp_path,
        tiny_model(family),
        sparsity,
        calibration_config=CALIBRATION,
        args={"max_steps": 5, "learning_rate": 1e-4},
    )
    run.train()
    (row,) = [json.loads(line) for line in (tmp_path / "mask_history.jsonl").read_text().splitlines()]
    assert 0 <= row["flip_rate"] < 0.05


def test_without_samples_of_its_own_a_start_is_calibrated_on_the_training_text(tmp_path: Path) -> None:
    sparsity = SparsityConfig(init="sparsegpt")
    runs: list[dict[str, Any]] = []
    for data in (None, blocks(), blocks(seed=7)):
        run = trainer(tmp_path, None, sparsity, calibration_config=CALIBRATION, calibration_dataset=data)
        runs.append(weights(run.model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_the_teacher_is_the_dense_model_before_sparsegpt_moved_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, None, SparsityConfig(init="sparsegpt"), calibration_config=CALIBRATION)
    dense = tiny_model("llama").state_dict()
    assert run.teacher is not None
    assert all(torch.equal(tensor, dense[name]) for name, tensor in run.teacher.state_dict().items())


def test_too_little_text_to_calibrate_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"512 tokens, fewer than calibration\.samples=128 windows of 16"):
        trainer(tmp_path, None, SparsityConfig(init="wanda"))


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_refresh_looks_at_the_inputs_of_the_step_before_it(
    tmp_path: Path, criterion: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[int, int]] = []
    reduced = InputRecorder.reduced_statistics

    def spy(self: InputRecorder) -> Any:
        found = reduced(self)
        used.append((len(found), next(iter(found.values())).sequences))
        return found

    monkeypatch.setattr(InputRecorder, "reduced_statistics", spy)
    sparsity = SparsityConfig(criterion=criterion, mask_interval=2, mask_decay=1e-2)
    run = trainer(tmp_path, tiny_model(family), sparsity, args={"gradient_accumulation_steps": 2})
    run.train()
    layers = sparse_layers(run.model)
    assert used == [(len(layers), 8)] * 3  # 2 micro-batches of 4 sequences, at steps 2, 4 and 6
    assert all(layer.pattern.holds(layer.weight, layer.group_dim) for layer in layers.values())
    assert not any(layer._forward_pre_hooks for layer in layers.values())


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_masks_by_activations_are_refreshed_under_bf16(tmp_path: Path, criterion: str) -> None:
    sparsity = SparsityConfig(criterion=criterion, mask_interval=2, mask_decay=1e-2)
    run = trainer(tmp_path, None, sparsity, args={"bf16": True, "use_cpu": True})
    run.train()
    assert all(layer.pattern.holds(layer.weight, layer.group_dim) for layer in sparse_layers(run.model).values())
    assert len((tmp_path / "mask_history.jsonl").read_text().splitlines()) == 3


def test_compilation_and_masks_by_activations_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"torch_compile=True hides the inputs that sparsity\.criterion=wanda"):
        trainer(tmp_path, None, SparsityConfig(criterion="wanda"), args={"torch_compile": True})


def test_rows_of_different_length_and_streams_cannot_be_calibrated_on(tmp_path: Path) -> None:
    ragged = Dataset.from_dict({"input_ids": [[1] * 16, [2] * 9, [3] * 16, [4] * 16]})
    stream = blocks().to_iterable_dataset()
    for data, message in ((ragged, "differ in length"), (stream, "no text to calibrate on")):
        with pytest.raises(UserError, match=message):
            trainer(
                tmp_path, None, SparsityConfig(init="wanda"), calibration_config=CALIBRATION, calibration_dataset=data
            )


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_activation_checkpointing_changes_no_mask_by_activations(tmp_path: Path, criterion: str) -> None:
    ends, passes = [], []
    for checkpointing in (False, True):
        sparsity = SparsityConfig(criterion=criterion, mask_interval=2, mask_decay=1e-2)
        run = trainer(tmp_path, None, sparsity, args={"gradient_checkpointing": checkpointing})
        passes.append(count_passes(run.model))
        run.train()
        ends.append({name: layer.mask.clone() for name, layer in sparse_layers(run.model).items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert len(passes[1]) - len(passes[0]) == 6  # another one in each step


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_run_by_activations_resumes_bit_identical(tmp_path: Path, criterion: str) -> None:
    def start(folder: Path) -> Any:
        sparsity = SparsityConfig(criterion=criterion, init="sparsegpt", mask_interval=2, mask_decay=1e-2)
        args = {"save_strategy": "steps", "save_steps": 3}
        return trainer(
            folder, None, sparsity, calibration_config=CALIBRATION, slorb_config=SLoRBConfig(k=8), args=args
        )  # fmt: skip

    whole = start(tmp_path / "whole")
    whole.train()
    again = start(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, found = weights(whole.model), weights(again.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
