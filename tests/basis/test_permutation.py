"""Channels reordered before pruning: the model computes the same, and groups hold strong and weak inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ast_sparse.basis.change import change_basis
from ast_sparse.basis.energies import measure_inputs
from ast_sparse.basis.objective import lost_share, smallest
from ast_sparse.basis.orders import deal, find_orders, reorder
from ast_sparse.basis.structure import find_structure
from ast_sparse.config import BasisConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import Pattern
from tests.basis.random_models import FAMILIES, random_model, tokens
from tests.families import family_model

PERMUTE, P24 = BasisConfig(), Pattern(2, 4)


@pytest.mark.parametrize(
    ("family", "tied"), [*((family, True) for family in FAMILIES), ("qwen2", False), ("gpt2", False)]
)
@torch.no_grad()
def test_a_reordered_model_computes_the_same(family: str, tied: bool) -> None:
    model, text = random_model(family, tied).double(), tokens()
    before, embedding = model(text).logits, model.get_input_embeddings().weight.clone()
    report = change_basis(model, PERMUTE, P24, text)
    # RMS norms of transformers compute in float32, even here
    assert torch.allclose(model(text).logits, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert report.permuted == ("residual channels", "MLP neurons", "values in heads")
    assert report.shares["permuted"] < report.shares["before"] and report.logit_error < 1e-4
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (ends[0] is ends[1]) == tied and not torch.equal(ends[0], embedding)
    assert torch.equal(ends[0].sort(1).values, embedding.sort(1).values)


@torch.no_grad()
def test_orders_are_those_of_energies_measured_in_one_run_of_the_model() -> None:
    model, text = random_model("qwen2"), tokens()
    structure = find_structure(model, text)
    inputs = list(measure_inputs(model, structure, text, False, 0.01, None, False))
    orders = find_orders(structure, inputs, 2, 4)
    with recorded(model) as seen:
        model(text)
    block = "model.layers.1."
    down = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    scores = seen[f"{block}mlp.down_proj"] * down[f"{block}mlp.down_proj"].weight.double().square().sum(0)
    assert orders.columns[3].tolist() == slowly_dealt(scores.tolist(), 2, 4)
    per_column = seen[f"{block}self_attn.o_proj"] * down[f"{block}self_attn.o_proj"].weight.double().square().sum(0)
    expected = []
    for head in range(4):  # two query heads share a key-value head
        first = head // 2 * 2
        shared = per_column[first * 8 : first * 8 + 8] + per_column[first * 8 + 8 : first * 8 + 16]
        expected += [head * 8 + place for place in slowly_dealt(shared.tolist(), 2, 4)]
    assert orders.columns[2].tolist() == expected
    stream = torch.zeros(32, dtype=torch.float64)
    for name in (name for name in down if "layers" in name and not name.endswith(("o_proj", "down_proj"))):
        energy = seen[name] * down[name].weight.double().square().sum(0)
        stream += energy / energy.sum()
    assert orders.channels.tolist() == slowly_dealt(stream.tolist(), 2, 4)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sum of the squares of the inputs of each linear layer."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):

            def hook(_: nn.Module, args: Any, name: str = name) -> None:
                seen[name] = args[0].double().flatten(0, -2).square().sum(0)

            handles.append(layer.register_forward_pre_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def slowly_dealt(scores: list[float], n: int, m: int) -> list[int]:
    left = sorted(range(len(scores)), key=lambda place: -scores[place])
    groups = [[left.pop(0) for _ in range(n)] for _ in range(len(scores) // m)]
    for group in groups:
        group += [left.pop() for _ in range(m - n)]
    return [place for group in groups for place in group]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
def test_each_group_gets_n_strong_and_the_rest_weak_ones(n: int, m: int) -> None:
    scores = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    found = deal(scores, n, m)
    assert found.tolist() == [slowly_dealt(row.tolist(), n, m) for row in scores]
    strong = scores.gather(1, found).unflatten(1, (-1, m))
    assert (strong[..., :n].amin((1, 2)) >= strong[..., n:].amax((1, 2))).all()
    assert deal(torch.rand(10), 2, 4).tolist() == list(range(10))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_what_a_group_loses_is_the_cheapest_way_to_prune_it(n: int, m: int) -> None:
    importance = torch.rand(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = importance.unflatten(1, (-1, m))
    slow = torch.stack([groups[..., list(pruned)].sum(-1) for pruned in combinations(range(m), m - n)]).amin(0)
    assert torch.allclose(smallest(importance, n, m), slow)


@torch.no_grad()
@pytest.mark.parametrize("with_hessian", [False, True])
def test_permuted_statistics_are_those_of_the_reordered_model(with_hessian: bool) -> None:
    model, text = random_model("llama"), tokens()
    structure = find_structure(model, text)

    def measure() -> list[Any]:
        return list(measure_inputs(model, structure, text, with_hessian, 0.01, None, False))

    inputs = measure()
    orders = find_orders(structure, inputs, 2, 4)
    reorder(structure, orders)
    permuted = [each.permuted(orders.channels, columns) for each, columns in zip(inputs, orders.columns, strict=True)]
    for ours, measured in zip(permuted, measure(), strict=True):
        for key in ("energy", "writer_energy", "inverse", "writer_inverse"):
            wanted = getattr(measured, key)
            assert torch.allclose(getattr(ours, key), wanted, rtol=2e-3, atol=1e-4 * float(wanted.abs().max())), key
        assert ours.totals == pytest.approx(measured.totals, rel=1e-4)
    assert lost_share(structure, permuted, 2, 4) == pytest.approx(lost_share(structure, measure(), 2, 4), rel=1e-3)


REFUSED = {
    "olmo2": "q_proj` neither reads the residual stream through a norm nor writes to it",
    "deepseek_v3": "neither reads the residual stream through a norm nor writes to it",
    "qwen2_moe": "Prune this model without a change of basis",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_is_not_understood_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=f"The basis of .* cannot be changed: .*{REFUSED[family]}"):
        change_basis(family_model(family), PERMUTE, P24, tokens())


def test_what_cannot_be_exact_or_has_no_groups_is_refused() -> None:
    model = random_model("llama")
    with pytest.raises(UserError, match=r"sparsity.pattern='unstructured' has no groups"):
        change_basis(model, PERMUTE, Pattern(1, 2, structured=False), tokens())
    with pytest.raises(UserError, match=r"embed_tokens.weight` is in bfloat16: a change of basis needs float32"):
        change_basis(model.bfloat16(), PERMUTE, P24, tokens())


def test_a_model_whose_logits_would_change_is_left_as_it_was() -> None:
    model, text = random_model("llama"), tokens()
    scale = torch.arange(48) / 24  # acts on neurons by their place, and the structure cannot see it
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: output * scale)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"computes something else in the new basis.* It is as it was"):
        change_basis(model, PERMUTE, P24, text)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
