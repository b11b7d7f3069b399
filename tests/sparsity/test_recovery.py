"""Block-wise recovery: what is trained, towards what, and what stays as it was."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import ast_sparse.sparsity.recovery as recovery_module
from ast_sparse.config import CalibrationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import refresh_masks, sparse_layers, sparsify_model
from ast_sparse.sparsity.recovery import BlockRecovery, block_loss, rate_at, runs_together
from ast_sparse.sparsity.slorb import SLoRB
from tests.models import tiny_model

SETTINGS = CalibrationConfig(recovery_epochs=3, recovery_learning_rate=1e-2, recovery_batch_size=2)


def samples(count: int = 5) -> Tensor:
    return torch.randint(0, 60, (count, 12), generator=torch.Generator().manual_seed(5))


class Block(nn.Module):
    """One linear layer with a bias, a vector, and a matrix that is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.other = nn.Linear(8, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.other(self.linear(hidden * self.norm))


def sparse_block() -> tuple[Block, list[Tensor], list[Tensor]]:
    """A block in float64 with its inputs and targets, which are not the outputs of the dense block from them."""
    torch.manual_seed(0)
    block = Block().double()
    inputs = [torch.randn(1, 6, 8, dtype=torch.float64) for _ in range(5)]
    with torch.no_grad():
        targets = [block(each + 0.1 * torch.randn_like(each)) for each in inputs]
    make_sparse(block.linear, Pattern(2, 4).mask(block.linear.weight.abs()), Pattern(2, 4))
    return block, inputs, targets


def slow_recovery(block: Block, inputs: list[Tensor], targets: list[Tensor]) -> dict[str, Tensor]:
    """AdamW written out, with the masked product and the loss of a whole batch at once."""
    linear, other, mask = block.linear, block.other, block.linear.mask.double()
    values = {"weight": linear.weight, "bias": linear.bias, "norm": block.norm, "last": other.bias}
    values = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2))

    def loss(batch: list[int]) -> Tensor:
        x, y = (torch.cat([each[i] for i in batch]) for each in (inputs, targets))
        z = (x * values["norm"]) @ (values["weight"] * mask).T + values["bias"]
        z = z @ other.weight.detach().T + values["last"]
        return (((z - y) ** 2).sum((-2, -1)) / (y**2).sum((-2, -1))).mean()

    before = loss([0, 1, 2, 3, 4]).detach()
    generator = torch.Generator().manual_seed(0)
    batches = [part.tolist() for _ in range(3) for part in torch.randperm(5, generator=generator).split(2)]
    for step, batch in enumerate(batches):
        rate = 1e-2 * min(1, (step + 1) / max(1, 0.1 * len(batches))) * (1 - 0.9 * step / len(batches))
        grads = torch.autograd.grad(loss(batch) / before, list(values.values()))
        for (name, value), grad in zip(values.items(), grads, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            scale = (second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
            with torch.no_grad():
                value -= rate * first[name] / (1 - 0.9 ** (step + 1)) / scale
    return values


def test_a_block_is_trained_as_in_a_loop_written_out() -> None:
    block, inputs, targets = sparse_block()
    expected, was = slow_recovery(block, inputs, targets), copy.deepcopy(block)
    recovery = BlockRecovery({"block": block}, SETTINGS)
    recovery("block", block, inputs, targets, ((), {}))
    found = {"weight": block.linear.weight, "bias": block.linear.bias, "norm": block.norm, "last": block.other.bias}
    mask = block.linear.mask
    for name, value in found.items():
        kept = mask if name == "weight" else torch.ones_like(value, dtype=torch.bool)
        torch.testing.assert_close(value[kept], expected[name][kept], rtol=1e-9, atol=1e-11)
    assert torch.equal(mask, was.linear.mask) and torch.equal(block.other.weight, was.other.weight)
    pruned, before = block.linear.weight[~mask].abs(), was.linear.weight[~mask].abs()
    assert (pruned <= before).all()  # settled
    before_error, after = recovery.errors["block"]
    with torch.no_grad():
        losses = [float(block_loss(block(each), wanted)) for each, wanted in zip(inputs, targets, strict=True)]
    assert after == pytest.approx(sum(losses) / len(losses)) and after < before_error


@pytest.mark.parametrize("fits", ["several", "one", "one, without an error"])
def test_sequences_run_together_only_where_that_gives_the_same(fits: str) -> None:
    block, inputs, _ = sparse_block()
    shift = {"several": torch.randn(1, 6, 8), "one": torch.randn(6, 8).flatten()[None], "one, without an error": None}[
        fits
    ]

    class Shifted(nn.Module):
        def forward(self, hidden: Tensor, shift: Tensor | None) -> Tensor:
            if fits == "one":
                return block((hidden.flatten() + shift).view(1, 6, 8))
            return block(hidden - hidden.mean(0) if shift is None else hidden + shift)

    assert runs_together(Shifted(), torch.cat(inputs[:2]), ((shift,), {})) == (fits == "several")


def test_the_loss_is_relative_to_all_tokens_together() -> None:
    targets = torch.tensor([[[1.0, 1.0], [3.0, 5.0]]])
    outputs = torch.tensor([[[1.5, 1.0], [3.0, 6.0]]])
    assert float(block_loss(outputs, targets)) == pytest.approx((0.5**2 + 1) / (1 + 1 + 9 + 25))
    assert [rate_at(step, 20) for step in (0, 1, 19)] == pytest.approx([0.5, 0.955, 0.145])


@pytest.mark.parametrize(("family", "init", "pattern"), [("llama", "sparsegpt", "2:4"), ("gpt2", "wanda", "2:4"),
                                                         ("opt", "sparsegpt", "unstructured")])  # fmt: skip
def test_a_recovered_model_is_closer_to_the_dense_one(family: str, init: str, pattern: str) -> None:
    dense, tokens = tiny_model(family).eval(), samples()
    outputs: list[Tensor] = []
    for settings in (CalibrationConfig(), replace(SETTINGS, recovery_learning_rate=2e-3)):
        model = tiny_model(family).eval()
        config = SparsityConfig(init=init, pattern=pattern)  # type: ignore[arg-type]
        report = sparsify_model(model, config, calibration_config=settings, samples=tokens)
        with torch.no_grad():
            outputs.append(model(input_ids=tokens).logits - dense(input_ids=tokens).logits)
        if init == "sparsegpt":
            for layer in sparse_layers(model).values():
                assert not layer.weight[~layer.mask].any()
        if pattern == "2:4":
            assert all(rates == (0.0, 0.0) for rates in refresh_masks(model).values())
        assert all(each.requires_grad == each.is_floating_point() for each in model.parameters())
    assert len(report.recovered) == 2 and all(after < before for before, after in report.recovered.values())
    assert outputs[1].square().mean() < 0.9 * outputs[0].square().mean()


def test_slorb_makes_up_for_what_is_lost_after_recovery() -> None:
    model, plain, dense = (tiny_model("gpt2").bfloat16() for _ in range(3))
    config, slow = SparsityConfig(init="sparsegpt", exclude=("unused",)), replace(SETTINGS, recovery_learning_rate=2e-3)
    for each, settings in ((model, slow), (plain, CalibrationConfig())):
        each.transformer.h[0].mlp.unused = nn.Linear(32, 32).bfloat16()  # an expert that no token reaches
        sparsify_model(each, config, SLoRBConfig(k=8), calibration_config=settings, samples=samples())
    tolerance = dict(rtol=2e-2, atol=2e-4)  # bfloat16 has 8 bits
    for name, layer in sparse_layers(model).items():
        lost = dense.get_parameter(f"{name}.weight").t().float() - layer.masked_weight().t().float()
        assert layer.slorb is not None and layer.weight.dtype == torch.bfloat16
        found, unrecovered = layer.slorb.S.float(), plain.get_submodule(name).slorb.S.float()
        torch.testing.assert_close(found, lost.unflatten(1, (-1, 8)).sum(-1) / 8, **tolerance)
        assert not torch.allclose(found, unrecovered, **tolerance)


@pytest.mark.parametrize(("family", "init"), [("llama", "wanda"), ("gpt2", "sparsegpt")])
def test_slorb_from_the_inputs_makes_up_for_more_and_is_recovered_too(family: str, init: str) -> None:
    dense, tokens = tiny_model(family).eval(), samples()
    config, slow = SparsityConfig(init=init), replace(SETTINGS, recovery_learning_rate=1e-3)  # type: ignore[arg-type]
    errors, adapters = [], []
    for settings in (CalibrationConfig(), slow):
        for slorb in (None, SLoRBConfig(k=8, init="svd")):
            model = tiny_model(family).eval()
            sparsify_model(model, config, slorb, calibration_config=settings, samples=tokens)
            with torch.no_grad():
                errors.append((model(input_ids=tokens).logits - dense(input_ids=tokens).logits).square().mean())
        adapters.append([layer.slorb for layer in sparse_layers(model).values()])
    plain, adapted, recovered, both = errors
    assert adapted < 0.95 * plain and both < 0.95 * recovered and both < 0.95 * adapted
    started, trained = ([each.S @ each.X for each in layers if each is not None] for layers in adapters)
    assert not any(torch.equal(one, other) for one, other in zip(started, trained, strict=True))


def test_weights_that_two_blocks_share_are_not_trained() -> None:
    block, inputs, targets = sparse_block()
    block.linear.slorb = SLoRB(torch.randn(8, 2).double(), torch.randn(2, 8).double())
    before = [each.detach().clone() for each in (block.linear.weight, block.linear.slorb.S, block.linear.slorb.X)]
    BlockRecovery({"a": block, "b": nn.ModuleList([block.linear])}, SETTINGS)("a", block, inputs, targets, ((), {}))
    after = (block.linear.weight, block.linear.slorb.S, block.linear.slorb.X)
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    assert not torch.equal(block.norm, torch.ones(8))


def test_a_block_that_gets_worse_keeps_its_weights_and_one_that_diverges_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(recovery_module, "logger", SimpleNamespace(warning=said.append))
    block, inputs, targets = sparse_block()
    before = copy.deepcopy(block.state_dict())
    for rate in (0.9, 0.99):
        settings = CalibrationConfig(recovery_epochs=1, recovery_learning_rate=rate)
        if rate == 0.99:
            monkeypatch.setattr(recovery_module, "rate_at", lambda step, steps: float("inf"))
            with pytest.raises(UserError, match=r"`block` diverged. Lower calibration.recovery_learning_rate=0.99"):
                BlockRecovery({"block": block}, settings)("block", block, inputs, targets, ((), {}))
        else:
            BlockRecovery({"block": block}, settings)("block", block, inputs, targets, ((), {}))
            assert len(said) == 1 and "its weights stay as they were" in said[0]
        assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_recovery_without_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"recovery_epochs=3 needs text, and sparsity.init='magnitude' reads none"):
        sparsify_model(tiny_model(), SparsityConfig(), calibration_config=SETTINGS)
    with pytest.raises(UserError, match=r"calibration.recovery_learning_rate=0(\.0)? must be above 0"):
        CalibrationConfig(recovery_learning_rate=0)
