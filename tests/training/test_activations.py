from pathlib import Path

import torch
from transformers.activations import FastGELUActivation, NewGELUActivation

from ast_sparse.kernels.activations import fused_activations
from tests.models import tiny_model
from tests.training.test_trainer import trainer, weights


def test_fused_gelus_equal_those_of_transformers_in_float64() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    for module in (NewGELUActivation(), FastGELUActivation()):
        (expected_grad,) = torch.autograd.grad(module(x).sum(), x)
        with fused_activations(module, None):
            fused = module(x)
        (grad,) = torch.autograd.grad(fused.sum(), x)
        torch.testing.assert_close(fused, module(x), rtol=1e-8, atol=1e-9)  # one of them rounds a constant
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-9)
        assert "forward" not in vars(module)


def test_only_the_input_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    module, x = NewGELUActivation(), torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        with fused_activations(module):
            module(x)
        assert kept == [32]
        module(x)
    assert len(kept) > 4


def test_activation_checkpointing_changes_nothing_with_fused_activations(tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_model("gpt2")
        run = trainer(
            tmp_path / str(checkpointing), model, args=dict(gradient_checkpointing=checkpointing, max_steps=2)
        )
        run.train()
        results.append(weights(run.model))
        assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
