"""Which layers of a plain model are N:M, also under an adapter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from ast_sparse import UserError, keep_sparsity
from ast_sparse.sparsity.kept import nm_layers, plain_name
from ast_sparse.sparsity.masks import Pattern
from tests.export.sparse_models import plain_sparse_model

NM = Pattern(2, 4)
LAYER = "model.layers.1.mlp.up_proj"
HALF = torch.tensor([1.0, 0, 1, 0])


@pytest.fixture
def model() -> PreTrainedModel:
    return plain_sparse_model()


def test_layers_of_the_blocks_whose_weights_fit(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(HALF.repeat(model.lm_head.weight.shape[1] // 4))
        model.get_parameter("model.layers.0.mlp.up_proj.weight").fill_(1)
    found = nm_layers(model, NM)
    assert len(found) == 13 and "lm_head" not in found and "model.layers.0.mlp.up_proj" not in found
    assert all(found[name] is model.get_submodule(name) for name in found)


def test_a_layer_that_is_zero_throughout_counts_if_it_is_recorded(model: PreTrainedModel) -> None:
    torch.nn.init.zeros_(model.get_parameter(f"{LAYER}.weight"))
    assert LAYER not in nm_layers(model, NM) and LAYER in nm_layers(model, NM, [LAYER])


def test_layers_with_one_weight_appear_once_and_codes_do_not(model: PreTrainedModel) -> None:
    first = model.get_submodule("model.layers.0.mlp.up_proj")
    model.get_submodule(LAYER).weight = first.weight
    codes = torch.nn.Parameter(HALF.to(torch.int8).repeat(48, 8), requires_grad=False)
    model.get_submodule("model.layers.0.mlp.gate_proj").weight = codes
    assert len(nm_layers(model, NM)) == 12


def test_a_weight_that_is_read_outside_its_layer_is_kept_too() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1, time_step_rank=4)
    model = MambaForCausalLM(config)
    name = "backbone.layers.0.mixer.dt_proj"
    with torch.no_grad():
        model.get_parameter(f"{name}.weight").mul_(HALF)
    assert list(keep_sparsity(model).layers) == [name]


@pytest.mark.parametrize("is_dora", [False, True])
def test_layers_below_an_adapter_are_found(is_dora: bool, model: PreTrainedModel) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=is_dora, modules_to_save=["up_proj"])
    adapted = get_peft_model(model, config)
    kept = keep_sparsity(adapted, recorded=[LAYER])
    names = {plain_name(name) for name in kept.layers if ".modules_to_save." not in name}
    assert len(names) == 14 and LAYER in names
    copies = [name for name in kept.layers if ".modules_to_save." in name]
    assert len(copies) == 2 and all(kept.layers[name].weight.requires_grad for name in copies)
    torch.nn.init.ones_(model.get_submodule(LAYER).original_module.weight)
    with pytest.raises(UserError, match=r"mlp\.up_proj\.original_module` is recorded as pruned, but its weight is not"):
        keep_sparsity(adapted, recorded=[LAYER])
