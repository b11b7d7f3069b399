"""The loss from hidden states inside the trainer, compared with the same run on full logits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from ast_sparse import DistillationConfig, SparseTrainer
from ast_sparse.distillation import chunked, sliced
from ast_sparse.training import losses
from tests.distillation.heads import SMALL
from tests.models import VOCAB, tiny_model
from tests.training.small_runs import blocks, trainer, weights


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_MIN_CHUNK", 1)
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", 24 * VOCAB)


def full_logits(run: SparseTrainer) -> SparseTrainer:
    """The slow twin."""
    assert "student" in run._loss.heads
    run._loss.heads.clear()
    return run


def family(name: str) -> Any:
    configs = {"gemma2": Gemma2Config(**SMALL, head_dim=8), "cohere": CohereConfig(**SMALL)}
    return AutoModelForCausalLM.from_config(configs[name]) if name in configs else tiny_model(name)


@pytest.mark.parametrize(
    "name, in_slices", [("llama", False), ("gpt2", False), ("gemma2", False), ("cohere", False), ("gemma2", True)]
)
def test_twenty_steps_equal_those_on_full_logits(
    tmp_path: Path, name: str, in_slices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with masks that change: 1e-6 relative after 20 steps. With `in_slices` as on a GPU."""
    monkeypatch.setattr(chunked, "counts_in_place", lambda device: in_slices)
    monkeypatch.setattr(sliced, "slice_size", lambda tokens, vocab: 24)
    results = []
    for slow in (False, True):
        torch.manual_seed(0)
        run = trainer(tmp_path / str(slow), family(name).double(), args=dict(max_steps=20))
        run = full_logits(run) if slow else run
        run.train()
        results.append(([log["loss"] for log in run.state.log_history if "loss" in log], weights(run.model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for key, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["tinybert", "mobilebert", "squarehead", "reverse_kl"])
def test_every_kind_of_distillation_has_the_loss_of_full_logits(tmp_path: Path, kind: str) -> None:
    losses = []
    for slow in (False, True):
        config = DistillationConfig(kind=kind, ce_weight=0.5, kl_weight=1.0, temperature=2.0)
        run = trainer(tmp_path / str(slow), distillation_config=config, args=dict(max_steps=3))
        (full_logits(run) if slow else run).train()
        losses.append([log["loss"] for log in run.state.log_history if "loss" in log])
    rounding = 1e-4 if kind == "squarehead" else 1e-5  # it is steep: CPUs differ by 2e-5 in the third step
    assert losses[0] == pytest.approx(losses[1], rel=rounding)


def test_evaluation_makes_no_logits_unless_metrics_need_them(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=blocks(count=6, seed=1))
    seen: list[Any] = []
    run.model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    plain = run.evaluate()
    assert seen and all(logits is None for logits in seen)
    seen.clear()
    run.compute_metrics = lambda prediction: {"width": prediction.predictions.shape[-1]}
    metrics = run.evaluate()
    assert metrics["eval_width"] == VOCAB and all(logits is not None for logits in seen)
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    loss, outputs = run.compute_loss(run.model, run.data_collator([blocks()[0]]), return_outputs=True)
    assert outputs.logits.shape[-1] == VOCAB and torch.isfinite(loss)


def test_a_head_that_is_not_understood_is_named_and_trains_on_full_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    said: list[str] = []
    monkeypatch.setattr(losses.logger, "warning", said.append)
    run = trainer(tmp_path, model)
    run.train()
    student, _ = said  # the teacher is its copy, hook included
    assert student.startswith("The loss needs full logits")
    assert student.endswith("The reason is the student, a LlamaForCausalLM: its head has hooks.")
    assert all(logits is not None for logits in seen)


def test_a_row_that_is_not_finite_is_left_out_of_the_losses_by_domain() -> None:
    found = losses.DomainLosses(("a", "b", "c"))
    labels = torch.tensor([[5, -100], [5, 5], [5, 5], [5, 5]])
    found.add(torch.tensor([0, 0, 1, 2]), torch.tensor([2.0, 0.0, 1.0, 3.0, math.nan, 1.0, 4.0, 4.0]), labels)
    found.add(torch.tensor([0, 2]), torch.tensor([math.inf, 1.0, 1.0, 1.0]), labels[2:])
    assert found.log_values() == {"domain_loss/a": 2.0, "domain_loss/c": 2.5}
