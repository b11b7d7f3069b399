import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import check_nm, nm_mask
from ast_sparse.sparsity.model import (
    apply_masks,
    densify_model,
    refresh_masks,
    select_layers,
    sparse_layers,
    sparsify_model,
)
from tests.models import FAMILIES, VOCAB, tiny_config, tiny_model

LINEARS_PER_BLOCK = {"llama": 7, "mistral": 7, "qwen2": 7, "opt": 6, "gpt2": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_blocks_is_selected_and_nothing_else(family: str) -> None:
    model = tiny_model(family)
    selected, skipped = select_layers(model)
    assert len(selected) == 2 * LINEARS_PER_BLOCK[family]
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in selected)
    assert skipped["lm_head"] == "outside the decoder blocks"
    assert "embedding" in skipped.values()


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_of_a_sparse_model_equals_a_dense_model_with_masked_weights(family: str) -> None:
    model, plain = tiny_model(family), tiny_model(family)
    sparsify_model(model, SparsityConfig())
    with torch.no_grad():
        for name in sparse_layers(model):
            weight = plain.get_submodule(name).weight
            dim = 0 if family == "gpt2" else 1
            weight.mul_(nm_mask(weight.abs().movedim(dim, -1)).movedim(-1, dim))
    ids = torch.randint(0, VOCAB, (2, 16))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)


def test_embeddings_tied_to_the_head_stay_dense() -> None:
    model = tiny_model("llama")
    assert model.config.tie_word_embeddings
    sparsify_model(model, SparsityConfig())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


def test_head_of_an_untied_model_stays_dense() -> None:
    config = tiny_config("llama")
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    assert "lm_head" in select_layers(model)[1]


def test_patterns_match_full_names_suffixes_and_wildcards() -> None:
    model = tiny_model("llama")
    chosen = select_layers(model, SparsityConfig(include=("mlp.*",), exclude=("model.layers.0.*",)))[0]
    assert set(chosen) == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    skipped = select_layers(model, SparsityConfig(exclude=("down_proj",)))[1]
    assert skipped["model.layers.1.mlp.down_proj"] == "in sparsity.exclude"


def test_the_matrices_of_an_adapter_are_not_masked() -> None:
    lora = LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), lora)
    with pytest.raises(UserError, match=r"model has a PEFT adapter: .* `model.merge_and_unload\(\)"):
        sparsify_model(model, SparsityConfig())


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"sparsity\.exclude: 'down_porj' matches no linear layer"):
        select_layers(tiny_model("llama"), SparsityConfig(exclude=("down_porj",)))


def test_no_layer_left_is_refused() -> None:
    with pytest.raises(UserError, match="No layer is left to prune"):
        sparsify_model(tiny_model("llama"), SparsityConfig(exclude=("*",)))


def test_in_features_that_are_not_a_multiple_of_m_are_refused_with_name_and_fix() -> None:
    with pytest.raises(UserError, match=r"`model\.layers\.0\.self_attn\.q_proj` .*in_features=32 is not a multiple"):
        sparsify_model(tiny_model("llama"), SparsityConfig(pattern="2:5"))


def test_slorb_k_that_does_not_divide_is_refused_before_anything_changes() -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"slorb\.k=32 does not divide in_features=48 of `model\.layers\.0\.mlp\.down"):
        sparsify_model(model, SparsityConfig(), SLoRBConfig(k=32))
    assert not sparse_layers(model)


def test_sparsifying_twice_is_refused() -> None:
    model = tiny_model("llama")
    sparsify_model(model, SparsityConfig())
    with pytest.raises(UserError, match="already sparse"):
        sparsify_model(model, SparsityConfig())


def test_a_layer_whose_forward_was_replaced_is_refused() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.forward = layer.forward  # as accelerate's hooks do
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj` has its own forward"):
        sparsify_model(model, SparsityConfig())


def test_several_lists_of_blocks_of_other_depths_are_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    model.tower = nn.ModuleList([nn.Linear(8, 8)])
    with pytest.raises(UserError, match="several lists of blocks"):
        select_layers(model)


def test_fused_experts_are_named_as_skipped() -> None:
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    report = sparsify_model(AutoModelForCausalLM.from_config(config), SparsityConfig())
    fused = [name for name in report.skipped if "experts" in name]
    assert len(fused) == 4 and all("not an nn.Linear" in report.skipped[name] for name in fused)
    assert len(report.pruned) == 8
    assert any("experts" in line for line in report.lines())


def test_report_counts_parameters_without_masks_and_tied_ones_once() -> None:
    model = tiny_model("llama")
    expected = sum(p.numel() for p in model.parameters())
    report = sparsify_model(model, SparsityConfig())
    assert report.total_parameters == expected
    assert report.pruned_parameters == sum(layer.weight.numel() for layer in sparse_layers(model).values())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_refresh_follows_the_weights_and_reports_both_flip_rates(family: str) -> None:
    model = tiny_model(family)
    sparsify_model(model, SparsityConfig())
    first = {name: layer.mask.clone() for name, layer in sparse_layers(model).items()}
    torch.manual_seed(1)
    for _ in range(2):
        before = {name: layer.mask.clone() for name, layer in sparse_layers(model).items()}
        with torch.no_grad():
            for layer in sparse_layers(model).values():
                layer.weight.add_(torch.randn_like(layer.weight) * 0.02)
        held = {name: layer.mask for name, layer in sparse_layers(model).items()}
        rates = refresh_masks(model)
        for name, layer in sparse_layers(model).items():
            dim = layer.group_dim
            assert layer.mask is held[name]
            assert torch.equal(layer.mask, nm_mask(layer.weight.abs().movedim(dim, -1)).movedim(-1, dim))
            flips = (layer.mask != before[name]).double().mean().item()
            assert rates[name] == pytest.approx((flips, (layer.mask != first[name]).double().mean().item()))
            assert flips > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_apply_masks_and_densify_give_the_same_weights(family: str) -> None:
    model = tiny_model(family)
    keys = set(model.state_dict())
    sparsify_model(model, SparsityConfig(pattern="1:4"))
    apply_masks(model)
    applied = {name: layer.weight.clone() for name, layer in sparse_layers(model).items()}
    assert all(check_nm(layer.weight, 1, 4, dim=layer.group_dim) for layer in sparse_layers(model).values())
    assert not any(torch.signbit(w[w == 0]).any() for w in applied.values())
    densify_model(model)
    assert set(model.state_dict()) == keys and not sparse_layers(model)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in applied.items())
