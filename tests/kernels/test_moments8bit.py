"""Moments in 8 bits beside moments in float32: bytes, steps, trajectories, resume."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ast_sparse import OptimizerConfig, SparseTrainer, UserError
from ast_sparse.kernels import moments8bit
from ast_sparse.kernels.updates import PLACEMENTS, StepValues, update_weights
from ast_sparse.optim import SparseAdamW
from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masks import Pattern, flip_rate, nm_mask
from ast_sparse.sparsity.model import masks_by_parameter, refresh_masks, sparse_layers
from tests.models import tiny_config
from tests.training.small_runs import trainer

STEPS = 200


def network(seed: int, sparse: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    for layer in (model[0], model[2]) if sparse else ():
        make_sparse(layer, nm_mask(layer.weight.detach().abs()), Pattern(2, 4))
    return model


def optimizer_of(model: nn.Module, moments: Any) -> SparseAdamW:
    masks = masks_by_parameter(model)
    others = [layer.bias for layer in sparse_layers(model).values()]
    groups = [{"params": list(masks), "is_masked": True}, {"params": others}]
    made = SparseAdamW(groups, lr=3e-4, betas=(0.9, 0.95), mask_decay=1e-3, moments=moments)
    made.bind_masks(masks)
    return made


def train(model: nn.Module, optimizer: SparseAdamW, steps: range) -> list[float]:
    target, losses = network(1, sparse=False), []
    for step in steps:
        inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - target(inputs).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            refresh_masks(model)
        losses.append(loss.item())
    return losses


def test_two_hundred_steps_end_within_one_percent_of_float32() -> None:
    """The loss of the last 20 steps; of the mask positions, 95 % are the same, while a quarter or more have changed."""
    models = {moments: network(0, sparse=True) for moments in ("float32", "8bit")}
    losses = {name: train(model, optimizer_of(model, name), range(STEPS)) for name, model in models.items()}
    last = {name: sum(values[-20:]) / 20 for name, values in losses.items()}
    assert last["float32"] < 0.5 * losses["float32"][0]
    assert last["8bit"] == pytest.approx(last["float32"], rel=0.01)
    for name, layer in sparse_layers(models["8bit"]).items():
        plain = models["float32"].get_submodule(name)
        assert flip_rate(plain.mask, plain.unpacked_start_mask()) > 0.2
        assert flip_rate(layer.mask, plain.mask) < 0.05


def test_moments_of_masked_weights_take_two_bytes_and_a_scale_for_every_256(tmp_path: Path) -> None:
    model = network(0, sparse=True)
    optimizer = optimizer_of(model, "8bit")
    train(model, optimizer, range(1))
    for layer in sparse_layers(model).values():
        state = optimizer.state[layer.weight]
        taken = sum(moments8bit.num_bytes(state[key]) for key in ("exp_avg", "exp_avg_sq"))
        assert taken == layer.weight.numel() * (2 + 8 / 256)
        assert optimizer.state[layer.bias]["exp_avg"].dtype == torch.float32  # others stay as they are
        assert not moments8bit.is_8bit(optimizer.state[layer.bias]["exp_avg"])


def test_a_state_that_is_saved_and_loaded_continues_to_the_bit(tmp_path: Path) -> None:
    model = network(0, sparse=True)
    optimizer = optimizer_of(model, "8bit")
    train(model, optimizer, range(15))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = copy.deepcopy(model)
    other = optimizer_of(resumed, "8bit")
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert train(model, optimizer, range(15, 25)) == train(resumed, other, range(15, 25))
    for ours, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def by_hand(moment: Tensor, signed: bool) -> Tensor:
    """The nearest of the codes of each block, in float64: the slow twin of torchao's binary search."""
    made = moments8bit.zero_moments(torch.zeros(64, 64))[0 if signed else 1]
    table, blocks = made.qmap.double(), moment.double().view(-1, 256)
    scale = blocks.abs().amax(-1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(table).abs().argmin(-1)
    return (table[nearest] * scale).view(moment.shape)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_one_update_is_that_of_float32_and_then_coded(placement: str) -> None:
    torch.manual_seed(0)
    weight, mask, grads = torch.randn(64, 80), torch.rand(64, 80) < 0.5, torch.randn(2, 64, 80)
    plain, coded = weight.clone(), weight.clone()
    whole, states = [torch.zeros(64, 80), torch.zeros(64, 80)], moments8bit.zero_moments(weight)
    for step, grad in enumerate(grads, start=1):
        values = StepValues(step, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1e-2)
        update_weights(placement, plain, grad, mask, *whole, values, "eager")
        update_weights(placement, coded, grad, mask, *states, values, "eager")
        assert torch.equal(plain, coded)  # the moments of this step are coded after it
        for entries, state, signed in zip(whole, states, (True, False), strict=True):
            expected = by_hand(entries, signed)
            torch.testing.assert_close(moments8bit.decoded(state).double(), expected, rtol=1e-6, atol=1e-9)
            entries.copy_(moments8bit.decoded(state))


def run(folder: Path, moments: Any = "8bit", **args: Any) -> SparseTrainer:
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.intermediate_size = 128  # the weights of the MLP have 4096 entries
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return trainer(folder, model, optimizer_config=OptimizerConfig(moments=moments), args=args)


def test_a_resumed_run_with_8bit_moments_ends_to_the_bit_like_a_whole_one(tmp_path: Path) -> None:
    settings: Any = dict(save_strategy="steps", save_steps=3)
    whole = run(tmp_path, **settings)
    whole.train()
    resumed = run(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match=r"optimizer\.moments='float32' differs from '8bit'"):
        run(tmp_path, "float32", **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_8bit_moments_need_torchao_and_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"optimizer\.moments='8bit' with optimizer\.offload=True"):
        OptimizerConfig(moments="8bit", offload=True)
    monkeypatch.setattr(moments8bit, "is_installed", lambda: False)
    with pytest.raises(UserError, match=r"needs torchao. Install it \(`pip install 'ast-sparse\[8bit\]'`\)"):
        run(tmp_path)
