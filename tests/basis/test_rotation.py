"""A learned rotation merged into the weights: the model computes the same, and the pattern takes less."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import ast_sparse.basis.rotation as rotation_module
from ast_sparse.basis import energies
from ast_sparse.basis.change import change_basis
from ast_sparse.basis.energies import Inputs, measure_inputs
from ast_sparse.basis.merge import Rotation, _by_rows, _in_heads, fold_norms, rotate
from ast_sparse.basis.objective import lost_share
from ast_sparse.basis.rotation import learn_rotation, orthogonal, sampled_shares
from ast_sparse.basis.structure import Structure, Unit, find_structure, weight_of
from ast_sparse.config import BasisConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.storage.tied import untie_head
from tests.basis.random_models import ROTATABLE, random_model, tokens

ROTATE, P24 = BasisConfig(rotation_steps=8, rotation_learning_rate=1e-2), Pattern(2, 4)


@pytest.mark.parametrize(("family", "tied"), [*((family, True) for family in ROTATABLE), ("qwen2", False)])
@torch.no_grad()
def test_a_rotated_model_computes_the_same(family: str, tied: bool, tmp_path: Path) -> None:
    model, text = random_model(family, tied), tokens()
    before, parameters = model(text).logits, model.num_parameters()
    report = change_basis(model, ROTATE, P24, text)
    assert torch.allclose(model(text).logits, before, rtol=0, atol=2e-5 * float(before.abs().max()))
    assert report.rotated == ("residual stream", "values in heads")
    assert report.shares["rotated"] < report.shares["permuted"]
    head = model.get_output_embeddings().weight
    assert report.added_parameters == (head.numel() if tied else 0) == model.num_parameters() - parameters
    assert (f"{report.added_parameters:,} parameters more" in "\n".join(report.lines())) == tied
    assert head is not model.get_input_embeddings().weight and model.model.norm.weight.unique().numel() == 1
    if family == "qwen2":  # with biases; an ordinary checkpoint
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not again.config.tie_word_embeddings and torch.equal(again(text).logits, model(text).logits)


def prepared(family: str = "llama", **values: Any) -> tuple[PreTrainedModel, Structure, list[Inputs]]:
    """A model with folded norms, and what its Hessians say."""
    model = random_model(family, **values)
    structure = find_structure(model, tokens())
    untie_head(model)
    fold_norms(structure)
    return model, structure, list(measure_inputs(model, structure, tokens(), True, 0.01, None, False))


def turned(size: int, count: int = 0, seed: int = 0) -> Tensor:
    """Random orthogonal matrices in float64."""
    shape = (count, size, size) if count else (size, size)
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


@torch.no_grad()
def test_folded_weights_keep_their_norm_and_the_gain_one_number() -> None:
    model, text = random_model("llama", tied=False), tokens()
    structure = find_structure(model, text)
    units = list(structure.units)
    for norm in structure.norms:
        norm.weight.mul_(0.05)
    before = model(text).logits
    norms = [weight.norm() for unit in units for weight in (joined(unit), model.lm_head.weight)]
    fold_norms(structure)
    assert torch.allclose(model(text).logits, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    after = [weight.norm() for unit in units for weight in (joined(unit), model.lm_head.weight)]
    assert torch.allclose(torch.stack(after), torch.stack(norms), rtol=1e-4)
    assert all(norm.weight.unique().numel() == 1 and norm.weight[0] < 0.2 for norm in structure.norms)


def joined(unit: Unit) -> Tensor:
    return torch.cat([weight_of(layer) for layer in unit.readers.values()])


@torch.no_grad()
def test_the_objective_in_a_rotated_basis_is_what_a_rotated_model_loses() -> None:
    model, structure, inputs = prepared("qwen2", tied=False)
    rotation = Rotation(turned(32), [None if unit.heads is None else turned(8, 2) for unit in structure.units])
    promised = sum(
        float(sampled_shares(unit, each, rotation.stream, *given, pattern=P24, share=1, by=torch.Generator()))
        for unit, each, heads in zip(structure.units, inputs, rotation.heads, strict=True)
        for given in [() if heads is None else (heads,)]
    )
    rotate(structure, rotation)
    measured = list(measure_inputs(model, structure, tokens(), True, 0.01, None, False))
    assert promised / 14 == pytest.approx(lost_share(structure, measured, 2, 4), rel=1e-3)


def test_gradients_of_the_objective_are_those_of_finite_differences() -> None:
    _, structure, inputs = prepared()
    attention, mlp = list(structure.units)[:2]
    for unit, seen, heads in ((attention, inputs[0], turned(8, 2)), (mlp, inputs[1], None)):
        seen = replace(seen, inverse=seen.inverse.double(), writer_inverse=seen.writer_inverse.double())
        leaves = [each.requires_grad_() for each in (turned(32), heads) if each is not None]

        def objective(*given: Tensor, unit: Any = unit, seen: Inputs = seen) -> Tensor:
            return sampled_shares(unit, seen, *given, pattern=P24, share=1, by=torch.Generator().manual_seed(0))

        gradients = torch.autograd.grad(objective(*leaves), leaves)
        for index, gradient in enumerate(gradients):
            by = torch.Generator().manual_seed(index)
            step = 1e-6 * torch.randn(gradient.shape, dtype=torch.float64, generator=by)
            up, down = ([*leaves[:index], leaves[index] + s * step, *leaves[index + 1 :]] for s in (1, -1))
            with torch.no_grad():
                found = float(objective(*up) - objective(*down)) / 2
            assert found == pytest.approx(float((gradient * step).sum()), rel=1e-5)


@torch.no_grad()
def test_samples_of_the_objective_have_its_mean() -> None:
    _, structure, inputs = prepared()
    unit = next(unit for unit in structure.units if unit.heads is not None)
    by = torch.Generator().manual_seed(0)
    stream, heads = turned(32).float(), turned(8, 2).float()
    exact = sampled_shares(unit, inputs[0], stream, heads, pattern=P24, share=1, by=by)
    samples = [sampled_shares(unit, inputs[0], stream, heads, pattern=P24, share=0.1, by=by) for _ in range(300)]
    assert float(torch.stack(samples).mean()) == pytest.approx(float(exact), rel=0.02)


@pytest.mark.parametrize("pattern", [P24, Pattern(1, 4), Pattern(4, 8)], ids=str)
def test_a_learned_rotation_is_orthogonal_the_same_for_a_seed_and_takes_less(pattern: Pattern) -> None:
    model, structure, inputs = prepared()
    first, again = (learn_rotation(structure, inputs, pattern, ROTATE, seed) for seed in (0, 0))
    other = learn_rotation(structure, inputs, pattern, ROTATE, 1)
    assert torch.equal(first.stream, again.stream) and not torch.equal(first.stream, other.stream)
    for matrix in (first.stream, *(heads for heads in first.heads if heads is not None)):
        eye = torch.eye(matrix.shape[-1], dtype=torch.float64)
        assert torch.allclose(matrix.mT @ matrix, eye.expand_as(matrix), atol=1e-12)
        assert not torch.allclose(matrix, eye.expand_as(matrix), atol=1e-3)
    before = lost_share(structure, inputs, pattern.n, pattern.m)
    rotate(structure, first)
    measured = list(measure_inputs(model, structure, tokens(), True, 0.01, None, False))
    assert lost_share(structure, measured, pattern.n, pattern.m) < before


def test_damping_adds_its_share_of_the_mean_diagonal_and_too_little_of_it_is_named() -> None:
    model, structure, _ = prepared()
    weak, strong = (
        list(measure_inputs(model, structure, tokens(), True, damping, None, False)) for damping in (0.25, 0.75)
    )
    for one, other in zip(weak, strong, strict=True):
        added = torch.linalg.inv(other.inverse.double()) - torch.linalg.inv(one.inverse.double())
        mean = one.energy.double().mean()
        torch.testing.assert_close(added, 0.5 * mean * torch.eye(len(added)).double(), rtol=0, atol=0.02 * float(mean))
    statistics: Any = SimpleNamespace(hessian=-torch.eye(4))
    with pytest.raises(UserError, match=r"calibration\.damping=0\.5 is not positive definite\. Raise calibration\.d"):
        energies._inverse(statistics, 0.5)


def test_a_change_of_basis_uses_its_damping_and_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[tuple[str, float]] = set()
    inverse, shares = energies._inverse, rotation_module.sampled_shares

    def damped(statistics: Any, damping: float) -> Tensor:
        used.add(("damping", damping))
        return inverse(statistics, damping)

    def sampled(*args: Any, **options: Any) -> Tensor:
        used.add(("share", options["share"]))
        return shares(*args, **options)

    monkeypatch.setattr(energies, "_inverse", damped)
    monkeypatch.setattr(rotation_module, "sampled_shares", sampled)
    change_basis(random_model("llama"), BasisConfig(rotation_steps=1, rotation_share=0.5), P24, tokens(), damping=0.1)
    assert used == {("damping", 0.1), ("share", 0.5)}


def test_an_almost_orthogonal_matrix_is_made_orthogonal() -> None:
    exact = turned(16, 3)
    noisy = exact + 1e-4 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(noisy)
    assert torch.allclose(found.mT @ found, torch.eye(16, dtype=torch.float64).expand_as(found), atol=1e-13)
    left, _, right = torch.linalg.svd(noisy.double())
    assert torch.allclose(found, left @ right, atol=1e-12)


REFUSED = {
    "gemma3_text": "cannot be rotated: a Gemma3RMSNorm is no RMS norm with a gain",
    "gpt2": "cannot be rotated: a LayerNorm is no RMS norm with a gain",
    "opt": "cannot be rotated: a LayerNorm is no RMS norm with a gain",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_be_rotated_is_refused_and_stays_as_it_is(family: str) -> None:
    model = random_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=f"{REFUSED[family]}.* Set basis.rotation_steps: 0"):
        change_basis(model, ROTATE, P24, tokens())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_embeddings_are_untied_only_if_wanted() -> None:
    with pytest.raises(UserError, match=r"basis.untie=False: .* \(4,096 parameters more\). Set basis.untie: true"):
        change_basis(random_model("llama"), replace(ROTATE, untie=False), P24, tokens())
    assert change_basis(random_model("llama", tied=False), replace(ROTATE, untie=False), P24, tokens()).rotated


def test_a_rotation_that_fails_leaves_the_model_as_it_was() -> None:
    model = random_model("llama")
    scale = torch.arange(32) / 24  # acts on channels of the stream by their place, and the structure cannot see it
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, output: output * scale)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"computes something else in the new basis.* It is as it was"):
        change_basis(model, ROTATE, P24, tokens())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert "lm_head.weight" in model.all_tied_weights_keys


def test_statistics_stay_where_the_model_is_while_blocks_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = random_model("llama"), tokens()
    structure, plain = find_structure(model, text), energies.calibrate_blocks

    def moved(model: Any, blocks: Any, *args: Any, **values: Any) -> Iterator[Any]:
        for block, found in zip(blocks.values(), plain(model, blocks, *args, **values), strict=True):
            here = [(module, dict(module._parameters)) for module in block.modules()]
            block.to("meta")
            yield found
            for module, parameters in here:
                module._parameters.update(parameters)

    monkeypatch.setattr(energies, "calibrate_blocks", moved)
    monkeypatch.setattr(energies, "_total", lambda *given: 1.0)  # reads weights
    for inputs in measure_inputs(model, structure, text, True, 0.01, None, False):
        parts = (inputs.energy, inputs.writer_energy, inputs.inverse, inputs.writer_inverse)
        assert {each.device.type for each in parts} == {"cpu"}


@pytest.mark.parametrize("where", ["model", "rotation"])
def test_a_model_in_host_memory_is_multiplied_where_the_rotation_is(where: str) -> None:
    with FakeTensorMode():  # which knows devices that this machine does not have
        place = {"model": "cpu", "rotation": "cuda"}
        rows = torch.empty(16, 16, device=place["model"])
        seen: list[set[str]] = []

        def change(rows: Tensor, matrix: Tensor, *given: int) -> Tensor:
            seen.append({rows.device.type, matrix.device.type})
            return _in_heads(rows, matrix, *given) if given else rows @ matrix

        _by_rows(rows, change, torch.empty(16, 16, dtype=torch.float64, device=place[where]))
        _by_rows(rows, change, torch.empty(2, 4, 4, dtype=torch.float64, device=place[where]), 2)
        assert seen == [{place[where]}] * 2
