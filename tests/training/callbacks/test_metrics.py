"""metrics.jsonl, and the values of speed and memory."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ast_sparse import SparseTrainer, SparsityConfig
from ast_sparse.storage.run_folder import METRICS, append_row, keep_rows_until
from ast_sparse.training.callbacks import metrics
from ast_sparse.training.callbacks.metrics import SpeedCallback, peak_flops
from tests.models import tiny_model
from tests.training.small_runs import arguments, blocks, trainer, weights

MEASURED = {"time", "tokens_per_second", "mfu", "memory_gib"}  # what differs between any two runs
AT_THE_END = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "student_flops"}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_every_record_of_the_log_is_a_line_with_step_epoch_and_time(tmp_path: Path) -> None:
    begin = time.time()
    run = trainer(tmp_path, args=dict(eval_strategy="steps", eval_steps=3), eval_dataset=blocks(count=4, seed=7))
    run.train()
    written = rows(tmp_path)
    assert [{key: row[key] for key in entry} for row, entry in zip(written, run.state.log_history, strict=True)] == (
        run.state.log_history
    )
    assert all(begin <= row["time"] <= time.time() and {"step", "epoch"} <= row.keys() for row in written)
    values = {key for row in written for key in row}
    assert {"loss", "learning_rate", "flip_rate", "mask_decay", "eval_loss", "eval_perplexity"} <= values
    assert {"tokens_per_second", "memory_gib"} <= values and "mfu" not in values  # the peak of a CPU is not known


def test_a_tracker_gets_the_records_of_the_file(tmp_path: Path) -> None:
    class Tracker(TrainerCallback):
        def __init__(self) -> None:
            self.told: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.told.append({**logs, "step": state.global_step})

    tracker = Tracker()
    run = trainer(
        tmp_path, args=dict(eval_strategy="steps", eval_steps=3), eval_dataset=blocks(count=4, seed=7),
        callbacks=[tracker],
    )  # fmt: skip
    run.train()
    written = [{key: value for key, value in row.items() if key not in ("epoch", "time")} for row in rows(tmp_path)]
    told = [{key: value for key, value in row.items() if key != "epoch"} for row in tracker.told]
    assert [row["step"] for row in told] == [row["step"] for row in written]
    for one, other in zip(told, written, strict=True):
        assert other.keys() - one.keys() <= {"total_flos"} and all(other[key] == one[key] for key in one.keys() & other)
    names = {key for row in told for key in row}
    assert {"flip_rate", "initial_flip_rate", "mask_decay", "learning_rate", "tokens_per_second"} <= names
    assert {"memory_gib", "eval_perplexity", "loss", "grad_norm"} <= names


def test_a_second_run_in_the_same_folder_starts_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        trainer(tmp_path, args=dict(max_steps=2)).train()
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2]


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resumed_run_has_each_record_once(tmp_path: Path, step: int) -> None:
    def run(resume: str | None = None) -> list[dict[str, Any]]:
        trainer = SparseTrainer(
            tiny_model("llama"),
            arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=3),
            sparsity_config=SparsityConfig(mask_interval=2),
            train_dataset=blocks(count=16),
        )
        trainer.train(resume_from_checkpoint=resume)
        kept = [{key: value for key, value in row.items() if key not in MEASURED} for row in rows(tmp_path)]
        return [row for row in kept if not AT_THE_END & row.keys()]

    whole = run()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 9, "lo')  # cut by a kill
    assert run(str(tmp_path / f"checkpoint-{step}")) == whole
    assert len([row for row in whole if "loss" in row]) == 9


def test_rows_up_to_the_step_are_kept_but_not_more_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    keep_rows_until(path, 1)
    assert not path.exists()
    for step in (1, 2, 2, 3):
        append_row(path, {"step": step})
    with path.open("a") as file:
        file.write("[]\n{}\n")
    keep_rows_until(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2}\n'
    keep_rows_until(path, 2, at_most=2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    append_row(tmp_path / "rows.jsonl", {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "note": "x"})
    assert (tmp_path / "rows.jsonl").read_text() == (
        '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5, "note": "x"}\n'
    )


def test_only_the_process_that_saves_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, args=dict(max_steps=1))
    monkeypatch.setattr(type(run.args), "should_save", property(lambda self: False))
    run.train()
    assert not (tmp_path / METRICS).exists()


class Clock(TrainerCallback):
    """Replaces `time.monotonic`: each optimizer step takes a second, evaluation and saving a thousand."""

    def __init__(self) -> None:
        self.now = 100.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.now += 1000  # a callback after the step, like the perplexities of `evaluation.steps`

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.now += 1

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.now += 1000


def test_tokens_per_second_leave_evaluation_and_saving_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock.now)
    run = trainer(
        tmp_path,
        args=dict(
            gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2
        ),
        eval_dataset=blocks(count=4, seed=7),
    )
    run.add_callback(clock)
    save = run.save_model

    def slow_save(*args: Any, **kwargs: Any) -> None:
        clock.now += 1000
        save(*args, **kwargs)

    monkeypatch.setattr(run, "save_model", slow_save)
    run.train()
    rates = [row["tokens_per_second"] for row in rows(tmp_path) if "loss" in row]
    assert rates == [2 * 4 * 16 / 1] * 6  # accumulated batches of 4 blocks of 16 tokens


def test_mfu_is_the_share_of_the_peak_of_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Arguments:
        world_size, bf16, device = 2, True, torch.device("cuda")

    monkeypatch.setattr(metrics, "mean_over_ranks", lambda values: values)
    monkeypatch.setattr(metrics.torch, "tensor", lambda value, device: value)
    monkeypatch.setattr(metrics.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    peaks = [3 * 2**30]
    monkeypatch.setattr(metrics, "peak_bytes", lambda on_gpu: peaks[-1] if on_gpu else 0)
    monkeypatch.setattr(metrics, "reset_peak", lambda on_gpu: peaks.append(2**30))
    speed = SpeedCallback(flops_per_token=10**9)
    speed.count(1000)
    speed._seconds = 0.5
    values = speed.log_values(Arguments())  # type: ignore[arg-type]
    assert values == {
        "tokens_per_second": 4000.0,  # 2000 from each rank
        "mfu": pytest.approx(2000 * 1e9 / 989.4e12),
        "memory_gib": 3.0,
    }
    Arguments.bf16 = False
    speed.count(1000)
    speed._seconds = 0.5
    assert "mfu" not in speed.log_values(Arguments())  # type: ignore[arg-type]
    assert speed.log_values(Arguments()) == {"memory_gib": 1.0}  # type: ignore[arg-type]  # nothing since the last call


def test_memory_is_the_peak_since_the_record_before(tmp_path: Path) -> None:
    class Large(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                bytearray(300_000_000)

    largest = bytearray(600_000_000)  # as a model that is measured before training
    del largest
    trainer(tmp_path, args=dict(max_steps=4), callbacks=[Large()]).train()
    used = [row["memory_gib"] * 2**30 for row in rows(tmp_path) if "loss" in row]
    assert used[2] - used[1] > 200e6 and used[2] - used[3] > 200e6
    assert max(used) - min(used) < 500e6


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756.5e12), ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_the_peak_is_known_by_the_name_of_the_gpu(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_without_the_callbacks_the_weights_are_the_same(tmp_path: Path) -> None:
    whole, bare = trainer(tmp_path / "whole"), trainer(tmp_path / "bare")
    for callback in (bare.watch, bare._speed, bare._metrics):
        bare.remove_callback(callback)
    whole.train(), bare.train()
    expected, got = weights(whole.model), weights(bare.model)
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
