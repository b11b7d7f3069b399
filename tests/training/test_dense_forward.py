"""Training with the whole weights, and a decay by their signs: `sparsity.forward: dense`, `decay_norm: l1`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ast_sparse import OptimizerConfig, SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import nm_mask
from ast_sparse.sparsity.model import sparse_layers
from tests.sparsity.small_layers import sparse_linear
from tests.training.small_runs import blocks, trainer

CAST = SparsityConfig(mask_interval=2, mask_decay=1e-4, decay_ramp=1.0, decay_norm="l1", forward="dense")


def test_a_layer_is_dense_in_training_and_masked_in_evaluation() -> None:
    layer = sparse_linear()
    layer.dense_forward = True
    inputs, dense = torch.randn(5, 8, dtype=torch.float64), layer.weight.detach().clone().requires_grad_()
    torch.testing.assert_close(layer(inputs), expected := F.linear(inputs, dense, layer.bias))
    layer(inputs).square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, dense.grad)
    masked = F.linear(inputs, torch.where(layer.mask, layer.weight, 0), layer.bias)
    torch.testing.assert_close(layer.eval()(inputs), masked)


def run(folder: Path, **kwargs: Any) -> Any:
    settings: Any = dict(save_strategy="steps", save_steps=3, **kwargs.pop("args", {}))
    return trainer(folder, None, kwargs.pop("sparsity", CAST), args=settings, **kwargs)


def test_a_run_is_resumed_to_the_bit_and_ends_exactly_2_4(tmp_path: Path) -> None:
    whole = run(tmp_path)
    whole.train()
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for layer in sparse_layers(whole.model).values():
        assert torch.equal(layer.weight != 0, layer.mask) and (nm_mask(layer.weight.abs()) | ~layer.mask).all()
    with pytest.raises(UserError, match=r"sparsity\.decay_norm='l2' differs from 'l1'"):
        l2 = SparsityConfig(**{**CAST.to_dict(), "decay_norm": "l2"})
        run(tmp_path, sparsity=l2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_evaluations_during_training_are_those_of_the_masked_model(tmp_path: Path) -> None:
    first = run(tmp_path, eval_dataset=blocks(4, seed=1))
    measured = first.evaluate()["eval_loss"]
    for layer in sparse_layers(first.model).values():
        layer.weight.data = torch.where(layer.mask, layer.weight, 0)
        layer.dense_forward = False
    assert first.evaluate()["eval_loss"] == measured


def test_what_a_dense_forward_pass_does_not_go_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sparsity\.forward='dense' needs masks that may change"):
        SparsityConfig(forward="dense", mask_interval=0)
    with pytest.raises(UserError, match=r"sparsity\.forward=dense with slorb would"):
        run(tmp_path, slorb_config=SLoRBConfig(k=16))
    with pytest.raises(UserError, match=r"optimizer\.offload=True keeps masked weights on the device"):
        run(tmp_path, optimizer_config=OptimizerConfig(offload=True))
