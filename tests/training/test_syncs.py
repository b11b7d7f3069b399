"""What a micro-batch and a step read back from a GPU, counted on a CPU."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.masking_utils import find_packed_sequence_indices

import ast_sparse.distillation.features as features_module
import ast_sparse.training.callbacks.watch as watch_module
import ast_sparse.training.start.model_calls as calls_module
from ast_sparse import DistillationConfig, SparseTrainer, SparsityConfig, WatchConfig, refresh_masks
from ast_sparse.distillation.features import (
    attention_kl,
    attention_mse,
    counted_positions,
    hidden_loss,
    relative_hidden_loss,
)
from ast_sparse.run import preemption as preemption_module
from ast_sparse.run.preemption import PreemptionCallback
from ast_sparse.run.signals import Preempted, PreemptionSignals
from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masks import Pattern, nm_mask
from ast_sparse.sparsity.model import count_kept
from ast_sparse.training.start.model_calls import borders_known
from tests.models import VOCAB, tiny_model, tiny_tokenizer
from tests.training.small_runs import blocks, trainer
from tests.training.syncs import Syncs, outside_micro_batches

LOSS_ON_A_CPU = "distillation/chunked.py"  # where rows without a label are left out, which a GPU does in another way


@pytest.mark.parametrize("sparsity", [None, 0.25, 0.5])
def test_a_refresh_of_all_masks_reads_back_once(sparsity: float | None) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 8) for _ in range(3)))
    for layer in model:
        mask = nm_mask(torch.rand_like(layer.weight)) if sparsity is None else torch.ones(8, 16, dtype=torch.bool)
        make_sparse(layer, mask, Pattern(2, 4))
    with Syncs() as syncs:
        refresh_masks(model, sparsity=sparsity)
    assert len(syncs.found) == 1, syncs.found
    with Syncs() as syncs:
        kept = count_kept(model)
    assert kept == 3 * 128 * (1 - (0.5 if sparsity is None else sparsity)) and len(syncs.found) == 1, syncs.found


class Steps(TrainerCallback):
    """What is found from the beginning of each step to that of the next: data and logs of a step included."""

    def __init__(self, syncs: Syncs) -> None:
        self.syncs = syncs
        self.found: list[list[str]] = []

    def on_step_begin(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.found.append(self.syncs.found)
        self.syncs.found = []


class Filter(TrainerCallback):
    """What callbacks see of `logging_nan_inf_filter`."""

    def __init__(self, seen: list[bool]) -> None:
        self.seen = seen

    def on_train_begin(self, args: Any, *others: Any, **kwargs: Any) -> None:
        self.seen.append(args.logging_nan_inf_filter)

    on_step_end = on_save = on_train_begin


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (features_module, calls_module):
        monkeypatch.setattr(module, "waits", lambda tensor: True)


def counted(run: SparseTrainer) -> tuple[list[str], list[list[str]]]:
    """What the micro-batches of a run find, and for each step what else is found in it."""

    def is_step_count(tensor: Tensor) -> bool:
        states = [] if run.optimizer is None else run.optimizer.state.values()
        return any("step" in state and state["step"].data_ptr() == tensor.data_ptr() for state in states)

    syncs = Syncs(stays_on_the_host=is_step_count)
    steps = Steps(syncs)
    run.add_callback(PreemptionCallback(PreemptionSignals(), run.watch))
    run.add_callback(steps)
    with syncs, outside_micro_batches(run, syncs) as by_batch:
        run.train()
    found = [line for batch in by_batch for line in batch]
    return [line for line in found if LOSS_ON_A_CPU not in line], steps.found


@pytest.mark.parametrize("packing", ["joined", "documents"])
def test_a_micro_batch_waits_for_nothing_and_a_step_once(tmp_path: Path, like_a_gpu: None, packing: str) -> None:
    kind = "kl" if packing == "joined" else "squarehead"
    run = trainer(
        tmp_path,
        sparsity=SparsityConfig(mask_interval=100, fast_forward="off"),
        distillation_config=DistillationConfig(kind=kind),
        args=dict(max_steps=3, gradient_accumulation_steps=2, logging_steps=100, bf16=True),
        train_dataset=blocks(64),
        processing_class=tiny_tokenizer(),
        packing=packing,
    )
    in_batches, in_steps = counted(run)
    assert in_batches == []
    assert [len(found) for found in in_steps] == [1, 1], in_steps
    assert all(found[0].startswith("tolist") and "watch.py" in found[0] for found in in_steps)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x[0]), lambda x: x[0].item(), lambda x: bool(x.any()), lambda x: x.nonzero(),
        lambda x: x[x > 0], lambda x: torch.equal(x, x), lambda x: x.tolist(), lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device=x.device), lambda x: x.masked_select(x > 0), lambda x: x.unique(),
        lambda x: torch.nn.utils.clip_grad_norm_([x], 1.0, error_if_nonfinite=True),
    ],
)  # fmt: skip
def test_the_counter_sees_a_wait(wait: Callable[[Tensor], Any]) -> None:
    x = torch.arange(4.0, requires_grad=True)
    x.grad = torch.ones(4)
    with Syncs() as syncs:
        (x * 2).sum()
        assert syncs.found == []
        with torch.no_grad():
            wait(x)
    assert len(syncs.found) == 1


def test_losses_that_are_not_finite_are_left_out_of_the_log(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, watch_config=WatchConfig(nan="skip"),
        args=dict(max_steps=6, logging_steps=3, gradient_accumulation_steps=2, save_strategy="steps", save_steps=6),
        train_dataset=blocks(64),
    )  # fmt: skip
    seen, raw = [], []  # type: ignore[var-annotated]
    run.add_callback(Filter(seen))
    inner, add = run.compute_loss, run.watch.add

    def troubled(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs) * (math.nan if run.state.global_step in (1, 3) and len(raw) % 2 else 1.0)

    run.compute_loss = troubled  # type: ignore[method-assign]
    run.watch.add = lambda inputs, loss: (raw.append(float(loss)), add(inputs, loss))[1]  # type: ignore[method-assign]
    run.train()
    steps = [sum(raw[index : index + 2]) for index in range(0, 12, 2)]
    expected = [statistics.fmean(filter(math.isfinite, steps[index : index + 3])) for index in (0, 3)]
    assert sum(map(math.isnan, raw)) == 2
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, rel=1e-6)
    assert run.args.logging_nan_inf_filter
    assert seen == [True] * 8  # trackers note the settings when training begins
    saved = torch.load(tmp_path / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert saved.logging_nan_inf_filter


def test_a_run_that_diverges_leaves_the_setting_of_the_filter(tmp_path: Path) -> None:
    run = trainer(tmp_path, args=dict(gradient_accumulation_steps=2))
    run.watch.add = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert run.args.logging_nan_inf_filter and not run._filters_losses


def test_a_signal_of_another_process_comes_with_the_read_back_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, signals = trainer(tmp_path), PreemptionSignals()

    def with_another(values: Tensor) -> Tensor:
        """The mean with a process that has the same values, and a signal at step 3."""
        assert values.shape == (4,)
        return values + 0.5 * torch.tensor([0, 0, 0, float(run.state.global_step == 2)])

    monkeypatch.setattr(watch_module, "mean_over_ranks", with_another)
    monkeypatch.setattr(preemption_module, "own_rank", lambda: (0, 2))
    monkeypatch.setattr(preemption_module, "any_rank", lambda *_: pytest.fail("a second read-back"))
    run.add_callback(PreemptionCallback(signals, run.watch))
    with pytest.raises(Preempted, match=r"^A signal to another rank: saved .*checkpoint-3; --resume"):
        run.train()


def test_documents_are_found_from_their_positions_as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [(16,), (5, 11), (1, 7, 8)]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    assert torch.equal(calls_module._borders(positions), find_packed_sequence_indices(positions))
    model = tiny_model("llama").eval()
    ids = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "position_ids": positions}):
        with torch.no_grad():
            usual = model(**inputs, use_cache=False).logits
            monkeypatch.setattr(calls_module, "waits", lambda tensor: True)
            with borders_known(inputs):
                known = model(**inputs, use_cache=False).logits
        assert torch.equal(known, usual)
    assert calls_module.masking_utils.find_packed_sequence_indices is find_packed_sequence_indices


def test_a_mask_of_positions_gives_the_losses_of_their_index() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (3, 5), generator=generator).masked_fill(torch.arange(15).view(3, 5) % 4 == 1, -100)
    index, mask = counted_positions(labels), labels != -100
    assert isinstance(index, tuple)
    hidden = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator)
    maps = torch.randn(2, 3, 2, 5, 5, dtype=torch.float64, generator=generator).tril().softmax(-1).tril()
    for loss, (ours, theirs) in (
        (hidden_loss, hidden), (relative_hidden_loss, hidden), (attention_mse, maps), (attention_kl, maps),
    ):  # fmt: skip
        results = []
        for positions in (index, mask):
            student = ours.clone().requires_grad_()
            value = loss(student, theirs, positions)
            results.append((value.detach(), torch.autograd.grad(value, student)[0]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_blocks_that_are_read_in_place_go_to_the_device_without_a_wait_before_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, copies = trainer(tmp_path), []

    class Pinned(Tensor):
        def is_pinned(self, *_: Any) -> bool:
            return True

        def to(self, *args: Any, **kwargs: Any) -> Tensor:
            copies.append((*args, kwargs))
            return self.as_subclass(Tensor).to(*args)

    device = torch.device("meta")
    monkeypatch.setattr(TrainingArguments, "device", property(lambda self: device))
    rows = [{"input_ids": torch.ones(2, 4).as_subclass(Pinned), "labels": torch.ones(2, 4)} for _ in range(3)]
    iterator = iter(rows)
    batches, tokens = run.get_batch_samples(iterator, 2, device)
    assert len(batches) == 2 and next(iterator) is rows[2]
    assert tokens.device == device and all(each.device == device for batch in batches for each in batch.values())
    assert copies == [(device, {"non_blocking": True})] * 2
