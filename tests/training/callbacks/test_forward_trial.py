"""`sparsity.semi_structured`: forward products of a run, and the choice between two kinds by the time of steps."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from ast_sparse import OptimizerConfig, SparsityConfig, UserError
from ast_sparse.kernels.gpu import cusparselt
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.training.callbacks import forward_trial
from ast_sparse.training.checks.semi_structured import check_semi_structured, dense_products
from tests.kernels.gpu.cpu_cusparselt import cpu_cusparselt
from tests.models import tiny_config
from tests.training.small_runs import arguments, trainer, weights

LOG = "ast_sparse.training.callbacks.forward_trial"


def model() -> PreTrainedModel:
    """Its attention has shapes that cuSPARSELt takes, its MLP has others."""
    config = tiny_config("llama")
    config.hidden_size, config.head_dim, config.intermediate_size, config.num_hidden_layers = 64, 16, 72, 1
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def run(folder: Path, choice: Any, args: dict[str, Any] | None = None, **settings: Any) -> Any:
    sparsity = SparsityConfig(mask_interval=2, mask_decay=1e-2, semi_structured=choice, **settings)
    return trainer(folder, model(), sparsity=sparsity, args={"bf16": True, **(args or {})})


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_run_multiplies_by_what_was_compressed_once_a_step(
    backend: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake operators multiply as dense products do, so that no loss and no weight may differ by much."""
    args = dict(
        max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2, torch_compile_backend=backend
    )
    found = []
    with cpu_cusparselt(monkeypatch) as calls:
        for choice in ("off", "on"):
            made = run(tmp_path / choice, choice, args)
            made.train()
            assert all(layer.masked_copy is None for layer in sparse_layers(made.student).values())
            losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
            found.append((losses, weights(made.student)))
            if choice == "off":
                assert not calls.compressed and not calls.multiplied
    assert calls.compressed == 4 * [(64, 64), (32, 64), (32, 64), (64, 64)] and len(calls.multiplied) == 2 * 4 * 4
    (dense, dense_weights), (sparse, sparse_weights) = found
    assert len(dense) == 4 and sparse == pytest.approx(dense, rel=1e-3)
    for name, tensor in dense_weights.items():
        torch.testing.assert_close(sparse_weights[name].float(), tensor.float(), rtol=0.1, atol=1e-2)


@dataclass
class Clock:
    """Steps with semi-structured products take 9 ms, others 10 ms; the warm-ups take longer the other way round."""

    multiplied: list[tuple[int, ...]]
    fast: float = 9.0
    marks: int = 0
    seen: int = 0

    def __call__(self) -> Any:
        self.marks += 1
        step, is_end = divmod(self.marks - 1, 2)
        used, self.seen = len(self.multiplied) > self.seen, len(self.multiplied)
        return Moment(0.0 if not is_end else (self.fast if used else 10.0) if step >= 4 else 100.0 - 90 * (not used))


@dataclass
class Moment:
    at: float

    def elapsed_time(self, end: "Moment") -> float:
        return end.at - self.at


@pytest.mark.parametrize(("fast", "choice"), [(9.0, "on"), (10.0, "off")])
def test_auto_keeps_what_makes_steps_faster(
    fast: float, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOG)
    with cpu_cusparselt(monkeypatch) as calls:
        monkeypatch.setattr(forward_trial, "_event", clock := Clock(calls.multiplied, fast))
        made = run(tmp_path, "auto", dict(max_steps=24, logging_strategy="no"))
        made.train()
    assert clock.marks == 40 and len(calls.multiplied) == 4 * (10 + 4 * (choice == "on"))
    assert (
        f"products: {choice} (sparsity.semi_structured=auto: a step takes {fast} ms with them and 10.0 ms without)"
        in (caplog.text)
    )


@pytest.mark.parametrize(
    ("settings", "args", "variable", "why"),
    [
        (dict(pattern="4:8"), {}, "auto", "sparsity.pattern='4:8', and the products are for 2:4"),
        (dict(schedule="gmp"), {}, "auto", "schedule='gmp' masks do not fit 2:4 from the beginning"),
        (dict(forward="dense"), {}, "auto", "sparsity.forward='dense'"),
        (dict(masked_weights="made"), {}, "auto", "sparsity.masked_weights='made'"),
        ({}, dict(bf16=False), "auto", "float32 without training.bf16"),
        ({}, dict(torch_compile_backend="cudagraphs"), "auto", "training.torch_compile_mode"),
        ({}, {}, "fixed", "AST_SPARSE_GPU=fixed"),
        ({}, dict(full_determinism=True), "auto", "full_determinism"),
        ({}, {}, "auto", "they need an NVIDIA GPU"),
    ],
)
def test_auto_says_why_products_stay_dense(
    settings: dict[str, Any], args: dict[str, Any], variable: str, why: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("AST_SPARSE_GPU", variable)
    caplog.set_level(logging.INFO, LOG)
    sparsity = SparsityConfig(semi_structured="auto", **settings)
    made: Any = arguments(tmp_path, **{"bf16": True, **args})
    trial = forward_trial.ForwardTrial(sparsity, OptimizerConfig())
    trial.on_train_begin(made, *[None] * 2, model=None)  # type: ignore[arg-type]
    (record,) = [each for each in caplog.records if each.name == LOG]
    assert record.getMessage().startswith("Semi-structured products: off (sparsity.semi_structured=auto: ")
    assert why in record.getMessage()
    trial.on_step_begin(made, *[None] * 2)  # type: ignore[arg-type]
    trial.on_step_end(made, *[None] * 2)  # type: ignore[arg-type]  # nothing is timed


def test_what_was_asked_for_and_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'on' would have no effect: the products are in float32"):
        run(tmp_path, "on", dict(bf16=False))
    offloaded = OptimizerConfig(offload=True)
    with pytest.raises(UserError, match=r"optimizer.offload=True no masked weights are kept. Change it, or set auto"):
        check_semi_structured(SparsityConfig(semi_structured="on"), offloaded, arguments(tmp_path, bf16=True))
    sharded: Any = arguments(tmp_path, bf16=True)
    sharded.fsdp = True
    monkeypatch.setattr("ast_sparse.training.checks.semi_structured.sharding_plugin", lambda args: args.fsdp)
    assert "FSDP2" in str(dense_products(SparsityConfig(), OptimizerConfig(), sharded))
    monkeypatch.undo()
    cusparselt.fault.cache_clear()
    with pytest.raises(UserError, match="there are no such products here: they need an NVIDIA GPU"):
        run(tmp_path, "on").train()
