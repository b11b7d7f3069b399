"""A loss that is not finite, or jumps."""

import copy
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ast_sparse import SparseTrainer, SparsityConfig, UserError, WatchConfig, replay_batch
from ast_sparse.errors import DivergenceError
from ast_sparse.training.callbacks.watch import load_batch
from tests.models import tiny_model
from tests.training.small_runs import arguments, blocks, weights


class Troubled(SparseTrainer):
    """The loss of chosen steps is multiplied."""

    factors: dict[int, float] = {}  # noqa: RUF012

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, *args, **kwargs)
        return loss * self.factors.get(self.state.global_step + 1, 1.0) if model.training else loss


class Before(TrainerCallback):
    """Weights and optimizer state before and after every update."""

    def __init__(self) -> None:
        self.states: list[tuple[dict[str, torch.Tensor], Any]] = []

    def _note(self, model: Any, optimizer: Any) -> None:
        self.states.append((weights(model), copy.deepcopy(optimizer.optimizer.state_dict()["state"])))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(kwargs["model"], kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(kwargs["model"], kwargs["optimizer"])


def troubled(folder: Path, factors: dict[int, float], watch: WatchConfig | None, **args: Any) -> Troubled:
    run = Troubled(
        tiny_model("llama"),
        arguments(folder, gradient_accumulation_steps=2, weight_decay=0.1, **args),
        sparsity_config=SparsityConfig(mask_interval=2, mask_decay=1e-2),
        watch_config=watch,
        train_dataset=blocks(count=64),
    )
    run.factors = factors
    return run


def losses(run: SparseTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_by_default_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path, factor: float) -> None:
    run, before = troubled(tmp_path, {3: factor}, None, save_strategy="steps", save_steps=2), Before()
    run.add_callback(before)
    line = rf"at step 3: loss is {factor}\. Last good checkpoint: .*checkpoint-2\. The batch: .*step-3-rank-0\.safe.* L"
    with pytest.raises(DivergenceError, match=line):
        run.train()
    assert len(before.states) == 4
    for name, parameter in run.model.named_parameters():
        assert not parameter.is_floating_point() or torch.equal(parameter, before.states[-1][0][name])  # masks changed


def test_by_default_a_jump_of_the_loss_changes_nothing(tmp_path: Path) -> None:
    runs = [troubled(tmp_path / str(i), {4: 1e4}, watch) for i, watch in enumerate((None, WatchConfig(spike="off")))]
    for run in runs:
        run.train()
    assert losses(runs[0])[3] > 100 * losses(runs[0])[2] and not (tmp_path / "0" / "replay").exists()
    assert not any("skipped_steps" in entry for entry in runs[0].state.log_history)
    assert "ast_sparse.watch" not in runs[0].state.stateful_callbacks


def broken_gradient(run: Troubled, step: int) -> None:
    """One gradient of the step is infinite while the loss is not."""
    parameter = next(p for p in run.student.parameters() if p.requires_grad)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf if run.state.global_step + 1 == step else gradient

    parameter.register_hook(spoil)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_counts_like_the_loss(tmp_path: Path, max_grad_norm: float) -> None:
    run = troubled(tmp_path, {}, None, max_grad_norm=max_grad_norm)
    broken_gradient(run, 2)
    with pytest.raises(DivergenceError, match=r"at step 2: gradient norm is (nan|inf)\."):
        run.train()


@pytest.mark.parametrize("trouble", ["loss", "gradient", "first", "spike"])
def test_a_skipped_step_leaves_weights_moments_and_step_counts_bit_for_bit(tmp_path: Path, trouble: str) -> None:
    step = {"first": 1, "spike": 4}.get(trouble, 3)
    watch = WatchConfig(nan="skip", spike="skip", spike_window=3)
    run, before = troubled(tmp_path, {step: 1e4 if trouble == "spike" else math.nan}, watch), Before()
    if trouble == "gradient":
        run.factors = {}
        broken_gradient(run, step)
    run.add_callback(before)
    run.train()
    for i in range(6):
        (weights_before, state_before), (weights_after, state_after) = before.states[2 * i : 2 * i + 2]
        same = all(torch.equal(tensor, weights_after[name]) for name, tensor in weights_before.items())
        assert same == (i + 1 == step)
        if same:
            assert state_before.keys() == state_after.keys()
            for key, entry in state_before.items():
                assert all(torch.equal(value, state_after[key][name]) for name, value in entry.items())
    assert run.state.global_step == 6 and run.lr_scheduler.last_epoch == 6
    counts = [entry["skipped_steps"] for entry in run.state.log_history if "skipped_steps" in entry]
    assert counts == [0] * (step - 1) + [1] * (7 - step)
    assert [path.name for path in (tmp_path / "replay").iterdir()] == [f"step-{step}-rank-0.safetensors"]
    assert all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values())


@pytest.mark.parametrize(("every", "step"), [(1, 3), (2, 3), (3, 2)])
def test_logged_means_leave_out_a_loss_that_is_not_finite(tmp_path: Path, every: int, step: int) -> None:
    seen: list[float] = []
    run = troubled(tmp_path, {step: math.nan}, WatchConfig(nan="skip"), logging_steps=every)
    judge = run.watch._verdict
    run.watch._verdict = lambda loss, norm: seen.append(loss) or judge(loss, norm)
    run.train()
    assert len(seen) == 6 and math.isnan(seen[step - 1])
    groups = [[loss for loss in seen[i : i + every] if math.isfinite(loss)] for i in range(0, 6, every)]
    assert losses(run) == pytest.approx([statistics.fmean(group) for group in groups if group])
    finite = [loss for loss in seen if math.isfinite(loss)]
    assert run.state.log_history[-1]["train_loss"] == pytest.approx(statistics.fmean(finite))


@pytest.mark.parametrize("spike", ["warn", "stop"])
def test_a_jump_is_judged_against_the_median_of_the_window(tmp_path: Path, spike: str) -> None:
    watch = WatchConfig(spike=spike, spike_window=3, spike_factor=2.0)
    run = troubled(tmp_path, {2: 3.0, 4: 1.9, 6: 2.1}, watch, max_steps=7)
    if spike == "stop":
        with pytest.raises(DivergenceError, match=r"step 6: loss is \S+, more than watch\.spike_factor=2 times \d"):
            run.train()
    else:
        run.train()
        usual = statistics.median(losses(run)[2:5])
        assert losses(run)[5] > 2 * usual and losses(run)[3] < 2 * statistics.median(losses(run)[:3])
    assert [path.name for path in (tmp_path / "replay").iterdir()] == ["step-6-rank-0.safetensors"]


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    watch = WatchConfig(nan="skip", max_skips=2)
    run = troubled(tmp_path, {1: math.nan, 2: math.nan, 4: math.nan, 5: math.nan, 6: math.nan}, watch)
    with pytest.raises(DivergenceError, match=r"step 6: loss is nan, after watch\.max_skips=2 skipped steps in a row"):
        run.train()


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_decides_like_an_uninterrupted_one(tmp_path: Path, step: int) -> None:
    def run(folder: Path, resume: str | None = None) -> Troubled:
        watch = WatchConfig(nan="skip", spike="skip", spike_window=4, spike_factor=2.0, max_skips=2)
        factors = {3: math.nan, 6: 2.5, 7: 3.0, 8: 1.5}  # 6 or 7 needs losses from before a resume
        trainer = troubled(folder, factors, watch, max_steps=9, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / f"checkpoint-{step}"))
    for one in (whole, resumed):
        counts = [entry["skipped_steps"] for entry in one.state.log_history if "skipped_steps" in entry]
        assert counts == [0, 0, 1, 1, 1, 2, 3, 3, 3]
    state = resumed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())


def test_a_checkpoint_from_before_the_watch_can_be_resumed_with_it(tmp_path: Path) -> None:
    troubled(tmp_path, {}, None, save_strategy="steps", save_steps=3).train()
    watch = WatchConfig(nan="skip", spike="skip")
    run = troubled(tmp_path, {5: math.nan}, watch, save_strategy="steps", save_steps=3)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert state["ast_sparse.watch"]["skipped"] == 1 and len(state["ast_sparse.watch"]["losses"]) == 2


def test_the_kept_batch_gives_the_same_loss_again(tmp_path: Path) -> None:
    run = troubled(tmp_path, {2: math.inf}, WatchConfig(nan="skip"), max_steps=2, logging_steps=2)
    seen: list[Any] = []
    inner = run.training_step

    def noting(model: Any, inputs: Any, *args: Any) -> Any:
        seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return inner(model, inputs, *args)

    run.training_step = noting  # type: ignore[method-assign]
    run.train()
    path = tmp_path / "replay" / "step-2-rank-0.safetensors"
    batches, header = load_batch(path)
    assert len(batches) == 2 and all({"input_ids", "labels"} <= batch.keys() for batch in batches)
    assert all(torch.equal(tensor, batches[i][name]) for i in range(2) for name, tensor in seen[2 + i].items())
    assert header["step"] == 2 and header["rank"] == 0 and header["what"] == "loss is inf"
    assert header["loss"] == math.inf and header["settings"]["watch"]["nan"] == "skip"
    model = run.student.eval()
    assert replay_batch(model, path) == [model(**batch).loss.item() for batch in seen[2:]]


@pytest.mark.parametrize(
    "spoil", [lambda path: None, lambda path: path.write_bytes(b"x"), lambda path: path.mkdir()],
    ids=["missing", "damaged", "folder"],
)  # fmt: skip
def test_a_batch_that_cannot_be_read_is_named(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "step-1-rank-0.safetensors"
    spoil(path)
    with pytest.raises(UserError, match=r"step-1-rank-0\.safetensors' cannot be read: .*Name a step-N-rank-R"):
        replay_batch(tiny_model("llama"), path)
