"""Which layers stay dense and why: weights read outside forward, routers, shared blocks, towers, subclasses."""

import logging
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BltConfig, Gemma3Config

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.model import decoder_blocks, densify_model, select_layers, sparse_layers, sparsify_model
from tests.families import family_config, family_model
from tests.models import VOCAB, tiny_model


def on_meta(family: str, **values: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(family_config(family, **values))


class Reader(nn.Module):
    """Computes with the weight of a linear layer in one of the ways that models do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.proj, self.other = way, nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        dense = self.proj
        if self.way == "matmul":
            return self.other(x) @ self.proj.weight.T
        if self.way == "F.linear":
            return F.linear(self.other(x), dense.weight)
        if self.way == "cat":
            return F.linear(self.other(x), torch.cat([self.proj.weight, self.proj.weight])[:32])
        if self.way == "einsum":
            return torch.einsum("bti,oi->bto", self.other(x), dense.weight)
        if self.way == "no read":
            return self.proj(self.other(x).to(self.proj.weight.dtype)) + torch.zeros_like(self.proj.weight)[0]
        return self.proj.forward(self.other(x))


@pytest.mark.parametrize(
    ("way", "dense"),
    [("matmul", True), ("F.linear", True), ("cat", True), ("einsum", True), ("no read", False), ("forward", False)],
)
def test_a_weight_that_is_read_outside_forward_stays_dense(way: str, dense: bool) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Reader(way)
    selected, skipped = select_layers(model)
    reason = "its weight is read by Reader outside its forward"
    assert (skipped.get("model.layers.1.mlp.proj") == reason) is dense
    assert ("model.layers.1.mlp.proj" in selected) is not dense
    assert "model.layers.1.mlp.other" in selected


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_dt_proj_of_mamba_stays_dense_in_plan_and_run_alike(family: str) -> None:
    model = family_model(family)
    report = sparsify_model(model, SparsityConfig(), SLoRBConfig(k=4))
    dense = [name for name, reason in report.skipped.items() if "outside its forward" in reason]
    assert dense and all(name.endswith("dt_proj") for name in dense)
    assert any(name.endswith("out_proj") for name in report.pruned)
    assert select_layers(on_meta(family))[1].keys() == report.skipped.keys()
    ids = torch.randint(1, VOCAB, (1, 12))
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.slorb = None
        masked = model.eval()(ids, use_cache=False).logits
        densify_model(model)
        torch.testing.assert_close(model(ids, use_cache=False).logits, masked)


def test_out_proj_of_multihead_attention_stays_dense() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = _Attends()
    assert "outside its forward" in select_layers(model)[1]["model.layers.0.mlp.attention.out_proj"]


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


def test_a_model_that_cannot_run_without_data_is_judged_by_its_source() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = _NeedsData("matmul")
    selected, skipped = select_layers(model)
    assert "outside its forward" in skipped["model.layers.0.mlp.proj"] and "model.layers.0.mlp.other" in selected


class _NeedsData(Reader):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.other(x) @ self.proj.weight.T + len(x.flatten().tolist())


def test_nothing_is_logged_if_a_model_cannot_run_without_data() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = _SplitsByData("matmul")
    records: list[logging.LogRecord] = []
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addFilter(records.append)
    try:
        _, skipped = select_layers(model)
    finally:
        logger.removeFilter(records.append)
    assert "outside its forward" in skipped["model.layers.0.mlp.proj"]
    assert records == [] and not logger.disabled


class _SplitsByData(Reader):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        first = torch.tensor([x.shape[-1]], device=x.device).item()
        return self.other(torch.split(x, [int(first)], -1)[0]) @ self.proj.weight.T


def test_falcon_is_pruned_and_gets_its_own_class_back() -> None:
    model = family_model("falcon")
    layer = model.transformer.h[0].mlp.dense_h_to_4h
    kind = type(layer)
    assert kind.__name__ == "FalconLinear"
    report = sparsify_model(model, SparsityConfig())
    assert len(report.pruned) == 8 and type(layer) is not kind
    densify_model(model)
    assert type(layer) is kind


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_subclass_that_computes_something_else_is_named_if_no_layer_is_left() -> None:
    model = tiny_model("llama")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".layers." in name:
            layer.__class__ = _Scaled
    with pytest.raises(UserError, match=r"No layer is left to prune: .*_Scaled is not a plain nn\.Linear or Conv1D"):
        select_layers(model)


ROUTERS = {
    "qwen2_moe": "mlp.shared_expert_gate", "doge": "mlp.router_gate", "llama4_text": "feed_forward.router",
    "phimoe": "mlp.router", "hunyuan_v1_moe": "mlp.gate.wg", "afmoe": "mlp.router.gate", "jetmoe": "mlp.router.layer",
    "qwen3_next": "mlp.shared_expert_gate", "gemma3n_text": "altup.modality_router",
}  # fmt: skip
NO_ROUTERS = {
    "llama": "mlp.gate_proj", "minimax": "self_attn.output_gate", "gemma3n_text": "per_layer_input_gate",
    "qwen3_5_moe_text": "linear_attn.in_proj_qkv", "moshi": "mlp.fc1", "qwen3_next": "linear_attn.out_proj",
}  # fmt: skip


@pytest.mark.parametrize(("family", "router"), ROUTERS.items())
def test_routers_stay_dense_unless_they_are_included_by_name(family: str, router: str) -> None:
    model = on_meta(family, **{"afmoe": {"num_dense_layers": 0}, "doge": {"is_moe": True}}.get(family, {}))
    selected, skipped = select_layers(model)
    names = [name for name, reason in skipped.items() if name.endswith(router) and reason == "router"]
    assert names and not any("router" in name for name in selected)
    if not names[0].endswith(("feed_forward.router", "mlp.router")):  # classes that compute more than a linear layer
        by_wildcard = select_layers(model, SparsityConfig(include=("model.layers.*",)))[0]
        assert not set(names) & set(by_wildcard)
        assert set(names) <= set(select_layers(model, SparsityConfig(include=(router,)))[0])
    assert set(names) <= set(select_layers(model, recorded=names)[0]) or names[0].endswith(".router")


@pytest.mark.parametrize(("family", "name"), NO_ROUTERS.items())
def test_full_projections_that_are_called_gates_are_pruned(family: str, name: str) -> None:
    assert any(key.endswith(name) for key in select_layers(on_meta(family))[0])


@pytest.mark.parametrize("width", [4, 32, 48])  # equal to the number of experts, the size, the depth
def test_a_gate_that_is_multiplied_with_a_layer_beside_it_is_pruned(width: int) -> None:
    model = on_meta("qwen2_moe", num_experts=4, shared_expert_intermediate_size=48)
    for layer in cast(Any, model).model.layers:
        layer.self_attn.mixer = nn.Module()
        for where in (layer.self_attn.mixer, layer):
            where.gate = nn.Linear(32, width, device="meta")
            where.up = nn.Linear(32, width, device="meta")
    selected = select_layers(model)[0]
    assert {"model.layers.0.gate", "model.layers.1.self_attn.mixer.gate"} <= set(selected)


@pytest.mark.parametrize("part", ["gate", "gating", "wg"])
def test_a_gate_with_an_output_for_every_expert_stays_dense(part: str) -> None:
    model = on_meta("qwen2_moe", num_experts=4)
    for layer in cast(Any, model).model.layers:
        setattr(layer, part, nn.Linear(32, 4, device="meta"))
    assert select_layers(model)[1][f"model.layers.0.{part}"] == "router"


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "dots1", "minimax"])
def test_routers_that_are_not_linear_layers_are_called_routers(family: str) -> None:
    skipped = select_layers(on_meta(family))[1]
    assert any(reason.startswith("router, a weight of shape") for reason in skipped.values())


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_layers_with_one_weight_are_counted_and_masked_once(family: str) -> None:
    model = family_model(family)
    report = sparsify_model(model, SparsityConfig(), SLoRBConfig(k=4))
    assert report.pruned_parameters < report.total_parameters
    weights = {id(layer.weight) for layer in model.modules() if hasattr(layer, "start_mask")}
    assert len(weights) == len(report.pruned) == len(sparse_layers(model))
    twins = [layer for layer in model.modules() if hasattr(layer, "start_mask")]
    assert len(twins) > len(weights)
    masks = {(id(layer.weight), id(layer.mask), id(layer.start_mask), id(layer.slorb)) for layer in twins}
    assert len(masks) == len(weights)
    densify_model(model)
    assert not any("start_mask" in name for name in model.state_dict())


def test_excluding_one_name_of_a_shared_weight_excludes_it() -> None:
    model = family_model("zamba")
    selected, skipped = select_layers(model, SparsityConfig(exclude=("model.layers.3.*",)))
    assert skipped["model.layers.1.shared_transf.self_attn.q_proj"] == "in sparsity.exclude"
    assert not any("shared_transf" in name for name in selected)


def test_a_linear_layer_tied_to_an_embedding_inside_the_blocks_stays_dense() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp
    layer.up_proj = nn.Linear(32, VOCAB, bias=False)
    layer.up_proj.weight = model.model.embed_tokens.weight
    reason = select_layers(model)[1]["model.layers.0.mlp.up_proj"]
    assert reason == "its weight is also that of `model.embed_tokens`"


def gemma3() -> nn.Module:
    text = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
    vision = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        )


def test_a_vision_tower_as_deep_as_the_text_model_is_not_pruned() -> None:
    model = gemma3()
    selected, skipped = select_layers(model)
    assert len(selected) == 14 and all(".language_model." in name for name in selected)
    assert all(reason == "outside the decoder blocks" for name, reason in skipped.items() if "vision" in name
               and name.endswith("_proj"))  # fmt: skip


@pytest.mark.parametrize("name", ["vision_tower", "audio_encoder", "mtp", "visual"])
def test_other_lists_of_the_same_depth_are_not_mistaken_for_the_decoder(name: str) -> None:
    model = tiny_model("llama")
    setattr(model.model, name, nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)]))
    setattr(model, f"beside_{name}", nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)]))
    assert list(decoder_blocks(model)) == ["model.layers.0", "model.layers.1"]


def test_a_head_that_is_called_decoder_is_not_mistaken_for_it() -> None:
    assert list(decoder_blocks(on_meta("modernbert-decoder"))) == ["model.layers.0", "model.layers.1"]


def test_a_decoder_that_is_not_one_list_of_blocks_is_refused_by_what_it_has() -> None:
    with pytest.raises(UserError, match=r"H_module\.layers\), none with 16 entries .* each block once"):
        decoder_blocks(on_meta("hrm_text"))
    parts: Any = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    config = BltConfig(**{f"{part}_config": parts for part in ("patcher", "encoder", "decoder", "global")})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"no list of decoder blocks .* outside parts with another class"):
        decoder_blocks(model)
