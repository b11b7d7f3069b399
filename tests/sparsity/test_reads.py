"""A model of a structure that has been tried is not run again, and any other one is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from ast_sparse import SLoRBConfig, SparsityConfig
from ast_sparse.sparsity import reads
from ast_sparse.sparsity.model import sparsify_model
from ast_sparse.sparsity.select import select_layers
from tests.models import tiny_model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were run."""
    tried: list[nn.Module] = []
    operands = reads._operands

    def counted(model: nn.Module, layers: Any) -> set[str] | None:
        tried.append(model)
        return operands(model, layers)

    monkeypatch.setattr(reads, "_KNOWN", {})
    monkeypatch.setattr(reads, "_operands", counted)
    return tried


def test_a_second_model_of_the_same_structure_is_not_run(runs: list[nn.Module]) -> None:
    first, second = (select_layers(tiny_model("llama", seed)) for seed in (0, 1))
    assert len(runs) == 1
    assert list(first[0]) == list(second[0]) and first[1] == second[1]


def test_a_sparse_model_one_with_slorb_and_a_loaded_one_are_of_the_structure_of_the_dense_one(
    runs: list[nn.Module], tmp_path: Path
) -> None:
    model = tiny_model("mistral")
    dense, _ = select_layers(model)
    assert set(select_layers(model, SparsityConfig(exclude=("q_proj",)))[0]) < set(dense)
    model.save_pretrained(tmp_path)
    sparsify_model(model, SparsityConfig(), SLoRBConfig(k=16))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(select_layers(model)[0]) == set(select_layers(loaded)[0]) == set(dense)
    assert len(runs) == 1


def test_another_family_is_run(runs: list[nn.Module]) -> None:
    for family in ("llama", "gpt2", "opt"):
        select_layers(tiny_model(family))
    assert len(runs) == 3


FORWARD = LlamaMLP.forward


def direct(self: Any, x: Tensor) -> Tensor:
    return torch.matmul(self.act_fn(self.gate_proj(x)) * (x @ self.up_proj.weight.t()), self.down_proj.weight.t())


def of_the_class(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LlamaMLP, "forward", direct)


def of_what_the_forward_calls(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LlamaMLP, "forward", lambda self, x: self.product(x))
    patch.setattr(LlamaMLP, "product", FORWARD, raising=False)
    select_layers(model)
    patch.setattr(LlamaMLP, "product", direct)


def of_the_modules(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if isinstance(module, LlamaMLP):
            patch.setattr(module, "forward", direct.__get__(module), raising=False)


@pytest.mark.parametrize("change", [of_the_class, of_what_the_forward_calls, of_the_modules])
def test_another_forward_is_run_and_what_it_reads_is_found(
    runs: list[nn.Module], monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    before, _ = select_layers(tiny_model("llama"))
    model = tiny_model("llama")
    change(model, monkeypatch)
    after, skipped = select_layers(model)
    gone = set(before) - set(after)
    assert len(runs) == 3 if change is of_what_the_forward_calls else len(runs) == 2
    assert {name.rpartition(".")[2] for name in gone} == {"up_proj", "down_proj"} and gone <= set(skipped)


def test_an_attribute_a_shape_a_shared_weight_and_a_hook_are_not_the_same_structure(runs: list[nn.Module]) -> None:
    def attribute(mlp: Any) -> None:
        mlp.limit = 7.0

    def shape(mlp: Any) -> None:
        mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[:, ::2].detach())

    def shared(mlp: Any) -> None:
        mlp.up_proj.weight = mlp.gate_proj.weight

    def hook(mlp: Any) -> None:
        mlp.register_forward_hook(lambda *_: None)

    keys = []
    for change in (None, attribute, shape, shared, hook):
        model: Any = tiny_model("llama")
        if change is not None:
            change(model.model.layers[0].mlp)
        keys.append(reads._structure(model))
    assert keys.pop() is None  # a hook may read whatever it likes
    assert len(set(keys)) == 4
