from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.activations import FastGELUActivation, NewGELUActivation

import ast_sparse.training.trainer as trainer_module
from ast_sparse import SparsityConfig
from ast_sparse.kernels.cpu import onednn
from ast_sparse.kernels.fast_forward import fast_forward, fast_step, is_used
from ast_sparse.kernels.recompute import Recomputation
from tests.models import tiny_model
from tests.training.small_runs import count_passes, trainer, weights


def test_fused_gelus_equal_those_of_transformers_in_float64() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    for module in (NewGELUActivation(), FastGELUActivation()):
        (expected_grad,) = torch.autograd.grad(module(x).sum(), x)
        with fast_forward(module, None):
            fused = module(x)
        (grad,) = torch.autograd.grad(fused.sum(), x)
        torch.testing.assert_close(fused, module(x), rtol=1e-8, atol=1e-9)  # one of them rounds a constant
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-9)
        assert "forward" not in vars(module)


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    module, x = NewGELUActivation(), torch.randn(4, 8, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)
    with fast_forward(module), hooks:
        module(x)
    assert kept == [32]
    with hooks:
        module(x)
    assert len(kept) > 4


def test_activation_checkpointing_changes_nothing_with_fast_forward(tmp_path: Path) -> None:
    results, passes = [], []
    for checkpointing in (False, True):
        model = tiny_model("gpt2")
        run = trainer(
            tmp_path / str(checkpointing), model, args=dict(gradient_checkpointing=checkpointing, max_steps=2)
        )
        passes.append(count_passes(run.model))
        run.train()
        results.append(weights(run.model))
        assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert len(passes[1]) - len(passes[0]) == 2  # another one in each step


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_twenty_steps_are_the_same_to_rounding_with_products_of_onednn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    histories, calls = [], []
    inner = onednn.product
    monkeypatch.setattr(onednn, "product", lambda *args: calls.append(1) or inner(*args))
    monkeypatch.setattr(onednn, "_WORTHWHILE", 0)
    for faster in (False, True):
        monkeypatch.setattr(onednn, "is_faster", lambda faster=faster: faster)
        run = trainer(tmp_path / str(faster), tiny_model(family), args=dict(max_steps=20, logging_steps=1))
        run.train()
        histories.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        assert bool(calls) is faster
    assert len(histories[0]) == 20
    assert histories[1] == pytest.approx(histories[0], rel=1e-4)


class _Gradients(TrainerCallback):
    """The gradients of the last step, before the update."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.last = {name: each.grad.clone() for name, each in named if each.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_in_bf16_on_a_cpu_is_as_near_to_float32_with_the_fast_paths_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    losses, gradients = [], []
    monkeypatch.setattr(onednn, "_WORTHWHILE", 0)
    for half, faster in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(onednn, "is_faster", lambda faster=faster: faster)
        monkeypatch.setattr(trainer_module, "fast_step", fast_step if faster else lambda *_: nullcontext())
        run = trainer(tmp_path / f"{half} {faster}", tiny_model(family), args=dict(max_steps=1, bf16=half))
        callback = _Gradients()
        run.add_callback(callback)
        run.train()
        losses.append(run.state.log_history[0]["loss"])
        gradients.append(callback.last)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)
    exact, plain, fast = gradients
    assert exact.keys() == fast.keys()
    size = torch.stack([each.norm() for each in exact.values()]).norm()
    for name, expected in exact.items():
        assert fast[name].dtype == torch.float32
        errors = [(each[name] - expected).norm() / size for each in (plain, fast)]
        assert errors[1] <= 1.5 * errors[0] + 1e-3 and errors[1] < 1e-2, name


def test_heads_and_layers_with_their_own_forward_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = own = lambda x: x
    with fast_forward(model):
        assert layer.forward is own
        assert "forward" not in vars(model.lm_head)
        assert "forward" in vars(model.model.layers[0].mlp.down_proj)
    assert [module for module in model.modules() if "forward" in vars(module)] == [layer]


@pytest.mark.parametrize(
    ("setting", "device", "needs_memory", "expected"),
    [
        ("auto", "cpu", False, True), ("auto", "cuda", False, False), ("auto", "cuda", True, True),
        ("on", "cuda", False, True), ("off", "cpu", True, False), ("off", "cuda", True, False),
    ],
)  # fmt: skip
def test_auto_recomputes_on_a_cpu_and_where_memory_is_short(
    setting: str, device: str, needs_memory: bool, expected: bool
) -> None:
    assert is_used(setting, torch.device(device), needs_memory) is expected


def test_frozen_models_and_passes_without_gradients_have_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recomputation, "__enter__", lambda self: pytest.fail("hooks of saved tensors"))
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    student, teacher = tiny_model("llama"), tiny_model("gpt2").requires_grad_(False)
    with fast_forward(teacher):
        changed = [type(module) for module in teacher.modules() if "forward" in vars(module)]
        assert changed == [NewGELUActivation] * 2
    with torch.no_grad(), fast_forward(student, teacher):
        assert not any("forward" in vars(module) for module in student.modules())
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    with fast_forward(teacher):
        assert "forward" in vars(teacher.transformer.h[0].attn.c_attn)


def test_a_run_without_it_changes_no_module_and_trains_to_the_same_losses(tmp_path: Path) -> None:
    losses, changed = [], []
    for setting in ("auto", "off"):
        sparsity = SparsityConfig(mask_interval=2, fast_forward=setting)
        run = trainer(tmp_path / setting, sparsity=sparsity, args=dict(max_steps=2))
        assert run.fast_forward is (setting == "auto")
        count: list[int] = []
        run.model.register_forward_hook(
            lambda model, *_, count=count: count.append(sum("forward" in vars(each) for each in model.modules()))
        )
        run.train()
        changed.append(max(count))
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert changed[0] > changed[1] == 1  # the head, whose place the loss takes
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
