"""`sparsity.semi_structured`: forward products of a run, and the choice between two kinds by the time of steps."""

import logging
from dataclasses import dataclass, field
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
from tests.training.small_runs import arguments, blocks, trainer, weights

LOG = "ast_sparse.training.callbacks.forward_trial"


def model() -> PreTrainedModel:
    """Its attention has shapes that cuSPARSELt takes, its MLP has others."""
    config = tiny_config("llama")
    config.hidden_size, config.head_dim, config.intermediate_size, config.num_hidden_layers = 64, 16, 72, 1
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def run(folder: Path, choice: Any, args: dict[str, Any] | None = None, **settings: Any) -> Any:
    sparsity = SparsityConfig(mask_interval=2, mask_decay=1e-2, semi_structured=choice, **settings)
    given = {"bf16": True, **(args or {})}
    held_out = blocks(2) if "eval_strategy" in given else None
    return trainer(folder, model(), sparsity=sparsity, args=given, eval_dataset=held_out)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": dict(torch_compile_backend="aot_eager"),
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "evaluated": dict(eval_strategy="steps", eval_steps=1),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_multiplies_by_what_was_compressed_once_a_step(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators for the CPU multiply as dense products do, so losses and weights stay as they are."""
    args = dict(max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=2, **RUNS[kind])
    found = []
    with cpu_cusparselt(monkeypatch) as calls:
        for choice in ("off", "on"):
            made = run(tmp_path / choice, choice, args)
            start = weights(made.student)
            made.train()
            assert all(layer.masked_copy is None for layer in sparse_layers(made.student).values())
            losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
            found.append((losses, weights(made.student)))
            if choice == "off":
                assert not calls.compressed and not calls.multiplied
    assert calls.compressed == 4 * [(64, 64), (32, 64), (32, 64), (64, 64)]
    assert len(calls.multiplied) == (2 if kind != "checkpointing" else 4) * 4 * 4
    (dense, dense_weights), (sparse, sparse_weights) = found
    assert len(dense) == 4 and sparse == pytest.approx(dense, rel=1e-6)
    for name, tensor in dense_weights.items():
        torch.testing.assert_close(sparse_weights[name], tensor, rtol=1e-5, atol=1e-6)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(start[name], sparse_weights[name], atol=1e-3)


@dataclass
class Clock:
    """Steps with semi-structured products take `fast` ms, others 10 ms; the first four would say the opposite."""

    multiplied: list[tuple[int, ...]]
    fast: float = 9.0
    marks: int = 0
    seen: int = 0
    timed: list[float] = field(default_factory=list)

    def __call__(self) -> Any:
        self.marks += 1
        step, is_end = divmod(self.marks - 1, 2)
        used, self.seen = len(self.multiplied) > self.seen, len(self.multiplied)
        took = (self.fast if used else 10.0) if step >= 4 else 1e6 * used
        return Moment(took if is_end else 0.0, self.timed)


@dataclass
class Moment:
    at: float
    timed: list[float]

    def elapsed_time(self, end: "Moment") -> float:
        self.timed.append(end.at - self.at)
        return self.timed[-1]


@pytest.mark.parametrize(
    ("fast", "elsewhere", "choice"), [(9.0, False, "on"), (10.0, False, "off"), (9.0, True, "off")]
)
def test_auto_keeps_what_makes_steps_faster_on_all_processes(
    fast: float,
    elsewhere: bool,
    choice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, LOG)
    with cpu_cusparselt(monkeypatch) as calls:
        asked: list[bool] = []  # whether there are products; whether they are slower
        monkeypatch.setattr(
            forward_trial, "any_rank", lambda flag, _: asked.append(flag) or flag or (elsewhere and len(asked) == 2)
        )
        monkeypatch.setattr(forward_trial, "_event", clock := Clock(calls.multiplied, fast))
        made = run(tmp_path, "auto", dict(max_steps=24, logging_strategy="no"))
        made.train()
    assert clock.marks == 40 and sorted(clock.timed) == sorted(8 * [fast, 10.0])
    assert len(asked) == 2 and len(calls.multiplied) == 4 * (10 + 4 * (choice == "on"))
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
        ({}, dict(torch_compile_backend="cudagraphs"), "auto", "CUDA graphs (training.torch_compile_backend"),
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
    with pytest.raises(UserError, match=r"with training.use_cpu=True there is no GPU. Change it"):
        check_semi_structured(SparsityConfig(semi_structured="on"), OptimizerConfig(), arguments(tmp_path), on_cpu=True)
    sharded: Any = arguments(tmp_path, bf16=True)
    sharded.fsdp = True
    monkeypatch.setattr("ast_sparse.training.checks.semi_structured.sharding_plugin", lambda args: args.fsdp)
    assert "FSDP2" in str(dense_products(SparsityConfig(), OptimizerConfig(), sharded))
    monkeypatch.undo()
    cusparselt.fault.cache_clear()
    with pytest.raises(UserError, match="there are no such products here: they need an NVIDIA GPU"):
        run(tmp_path, "on").train()
    monkeypatch.setattr(cusparselt, "fault", lambda device: None)
    for choice, elsewhere in (("on", False), ("auto", True)):  # another process may lack them
        monkeypatch.setattr(forward_trial, "any_rank", lambda flag, _, elsewhere=elsewhere: flag or elsewhere)
        unfit = trainer(tmp_path, sparsity=SparsityConfig(semi_structured=choice), args=dict(bf16=True, max_steps=1))
        if choice == "on":
            with pytest.raises(UserError, match=r"no layer has a shape that they take. Set off"):
                unfit.train()
        else:
            unfit.train()


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5, 8, 10])
def test_no_interval_of_steps_hits_most_of_one_kind(interval: int) -> None:
    turns = [forward_trial._turn(step) for step in range(forward_trial.WARM_UPS + forward_trial.TIMED)]
    assert turns.count(True) == 10 and turns[forward_trial.WARM_UPS :].count(True) == 8
    hit = [turns[step] for step in range(interval - 1, len(turns), interval) if step >= forward_trial.WARM_UPS]
    assert max(hit.count(True), hit.count(False)) in (*range(4), 8 // interval)
