"""Compressed checkpoints through transformers' own loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ast_sparse import SparsityConfig
from ast_sparse.export import quantizer
from ast_sparse.export.codec24 import CODE24
from ast_sparse.export.export import export_model
from ast_sparse.export.quantizer import AstSparse24Config, CompressedLinear
from ast_sparse.kernels.native import products24
from ast_sparse.kernels.native.library import of_level, usable_levels
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import sparsify_model
from ast_sparse.storage.files import read_json, write_json
from ast_sparse.storage.load import load_causal_lm
from tests.export.sparse_models import change_tensors, masked_state, sparse_model, token_ids
from tests.families import family_model
from tests.models import FAMILIES
from tests.processes import run_python

FIRST = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def compressed(family: str, tmp_path: Path) -> Path:
    export_model(sparse_model(family), tmp_path / "out", "compressed")
    return tmp_path / "out"


def load_compressed(folder: Path, dequantize: bool = False, **kwargs: Any) -> PreTrainedModel:
    config = AstSparse24Config(dequantize=dequantize)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


@pytest.mark.parametrize("any_family", FAMILIES)
def test_loaded_model_is_plain_and_holds_the_masked_weights(any_family: str, tmp_path: Path) -> None:
    model = sparse_model(any_family)
    export_model(model, tmp_path / "out", "compressed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = masked_state(model, torch.bfloat16)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert not any(isinstance(module, CompressedLinear) for module in loaded.modules())
    assert not hasattr(loaded.config, "quantization_config") and not getattr(loaded, "hf_quantizer", None)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_compressed_layers_in_memory_compute_the_same(family: str, compressed: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(compressed).eval()
    packed = load_compressed(compressed).eval()
    pruned = read_json(compressed / "config.json")["quantization_config"]["modules"]
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, CompressedLinear)}
    assert sorted(layers) == pruned
    for name, layer in layers.items():
        reference = dense.get_submodule(name)
        weight = reference.weight.t() if isinstance(reference, Conv1D) else reference.weight
        assert torch.equal(layer.dense_weight(), weight)
        assert layer.weight.nbytes + layer.weight_meta.nbytes == 0.5625 * weight.nbytes
        assert not layer.weight.requires_grad
    torch.testing.assert_close(packed(token_ids()).logits, dense(token_ids()).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", usable_levels())
def test_the_c_kernels_give_the_logits_and_tokens_of_the_dense_model(
    level: str, dtype: torch.dtype, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(compressed, dtype=dtype).eval()
    packed = load_compressed(compressed, dtype=dtype).eval()
    layers = [module for module in packed.modules() if isinstance(module, CompressedLinear)]
    assert {layer.weight.dtype for layer in layers} == {dtype}
    used, products = of_level(level), 0

    def product(*args: Any) -> Tensor:
        nonlocal products
        products += 1
        return by_kernels(*args)

    by_kernels = products24._by_kernels
    monkeypatch.setattr(products24, "kernels", lambda: used)
    monkeypatch.setattr(products24, "_by_kernels", product)
    monkeypatch.setattr(products24, "_kernels_win", lambda *_: True)
    ids = token_ids()
    with torch.no_grad():
        found, expected = packed(ids).logits, dense(ids).logits
        assert products == len(layers) > 0
        if dtype == torch.float32:
            generate = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(packed.generate(ids[:, :3], **generate), dense.generate(ids[:, :3], **generate))
            assert products == 13 * len(layers)
        exact = dense.double()(ids).logits
    errors = [(logits.double() - exact).square().mean().sqrt() for logits in (found, expected)]
    assert errors[0] <= 1.5 * errors[1]


def test_torch_compile_sees_one_node_for_each_compressed_layer(compressed: Path) -> None:
    model = load_compressed(compressed).eval()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    ids = token_ids()
    with torch.no_grad():
        found, expected = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert seen.count("ast_sparse.linear24.default") == len(layers) > 0


def test_compressed_model_in_memory_saves_and_dequantizes(compressed: Path, tmp_path: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(compressed)
    packed = load_compressed(compressed)
    packed.save_pretrained(tmp_path / "again")
    again = load_compressed(tmp_path / "again", dequantize=True)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in again.state_dict().items())
    decoded = packed.dequantize()
    assert not any(isinstance(module, CompressedLinear) for module in decoded.modules())
    weights = decoded.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())
    assert all(value.dtype == weights[name].dtype for name, value in dense.state_dict().items())


def test_model_without_head_loads_its_compressed_layers(family: str, compressed: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(compressed)
    for options in ({}, {"quantization_config": AstSparse24Config(dequantize=False)}):
        base = AutoModel.from_pretrained(compressed, **options).eval()
        expected = whole.base_model(token_ids()).last_hidden_state
        torch.testing.assert_close(base(token_ids()).last_hidden_state, expected, rtol=2e-2, atol=2e-2)


def test_other_dtypes_are_cast_from_the_stored_one(family: str, compressed: Path) -> None:
    stored = AutoModelForCausalLM.from_pretrained(compressed)
    for module in (stored, AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.float32)):
        weight = module.get_parameter(f"{FIRST[family]}.weight")
        assert weight.dtype == module.dtype
        assert torch.equal(weight.float(), stored.get_parameter(f"{FIRST[family]}.weight").float())


def _bad_nibble(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.weight_meta"][1, 0] = 0x40  # low nibble 0: the same position twice


def _no_meta(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}.weight_meta"]


def _no_values(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}.weight"]


def _short_meta(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.weight_meta"] = tensors[f"{name}.weight_meta"][:, :-1]


def _fewer_columns(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, :-4]
    tensors[f"{name}.weight_meta"] = tensors[f"{name}.weight_meta"][:, :-1]


@pytest.mark.parametrize("damage", [_bad_nibble, _no_meta, _no_values, _short_meta, _fewer_columns])
def test_damaged_layer_is_named(damage, family: str, compressed: Path) -> None:
    change_tensors(compressed, lambda tensors: damage(tensors, FIRST[family]))
    with pytest.raises(ValueError, match=f"damaged: `{FIRST[family]}`: "):
        AutoModelForCausalLM.from_pretrained(compressed)


@pytest.mark.parametrize("damage", [_bad_nibble, _no_meta, _no_values, _short_meta, _fewer_columns])
def test_damaged_layer_that_stays_compressed_is_refused(damage, family: str, compressed: Path) -> None:
    change_tensors(compressed, lambda tensors: damage(tensors, FIRST[family]))
    with pytest.raises(  # a wrong shape is found by transformers, which names the layer in its log
        (ValueError, RuntimeError), match=f"damaged: `{FIRST[family]}`: |ignore_mismatched_sizes"
    ):
        load_compressed(compressed)


def test_newer_format_is_refused_with_the_fix(compressed: Path) -> None:
    config = read_json(compressed / "config.json")
    assert config["quantization_config"]["format_version"] == 1
    config["quantization_config"]["format_version"] = 2
    write_json(compressed / "config.json", config)
    with pytest.raises(ValueError, match="Update ast_sparse"):
        AutoModelForCausalLM.from_pretrained(compressed)


@pytest.mark.parametrize(
    ("key", "value"),
    [("format_version", "1"), ("format_version", 0), ("format_version", True), ("dequantize", "no"), ("modules", "abc"),
     ("modules", [1])],
)  # fmt: skip
def test_damaged_description_is_named_by_its_key(compressed: Path, key: str, value: object) -> None:
    config = read_json(compressed / "config.json")
    config["quantization_config"][key] = value
    write_json(compressed / "config.json", config)
    with pytest.raises(ValueError, match=rf"ast_sparse_24: {key}=.*Restore config\.json"):
        AutoModelForCausalLM.from_pretrained(compressed)


def test_reader_without_the_plugin_stops(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out", "compressed")
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = run_python(code, tmp_path / "out", check=False)
    assert done.returncode != 0 and "ast_sparse_24" in done.stderr


def test_compressed_linear_passes_gradients_to_its_input(compressed: Path) -> None:
    layer = next(module for module in load_compressed(compressed).modules() if isinstance(module, CompressedLinear))
    assert isinstance(layer, nn.Linear)
    features = torch.randn(2, layer.in_features, dtype=layer.weight.dtype, requires_grad=True)
    layer(features).sum().backward()
    expected = layer.dense_weight().sum(0).expand(2, -1)
    assert features.grad is not None
    torch.testing.assert_close(features.grad, expected, rtol=2e-2, atol=2e-2)


def test_a_rank_of_tensor_parallelism_decodes_its_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.where(Pattern(2, 4).mask(weight.abs()), weight, 0)
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    monkeypatch.setattr(quantizer, "local", lambda parameter: parameter[4:8])  # of a DTensor
    stored = {f"{name}$": part[4:8] for name, part in zip(CODE24.names, CODE24.encode(weight, None), strict=True)}
    problems: list[str] = []
    found = quantizer.DecodeWeight(CODE24, frozenset({"0"}), problems).convert(stored, "0.weight", model)
    assert not problems and torch.equal(found["0.weight"], weight[4:8])


def test_older_transformers_asks_for_conversions_without_a_model() -> None:
    config = AstSparse24Config(modules=["a"], dequantize=True)
    own = object()
    first, decoding = quantizer.CompressedHfQuantizer(config).update_weight_conversions([own])
    assert first is own and decoding.target_patterns == ["weight"]


def test_a_renaming_of_transformers_that_changes_a_name_of_the_model_does_not_hide_a_layer(tmp_path: Path) -> None:
    model = family_model("laguna", mlp_layer_types=["dense", "sparse"])  # `shared_experts.` matches `shared_expert.`
    report = sparsify_model(model, SparsityConfig())
    assert any("shared_experts" in name for name in report.pruned)
    export_model(model, tmp_path / "out", "compressed", dtype="float32")
    expected = model.eval()(token_ids()).logits
    for dequantize in (True, False):
        loaded = load_compressed(tmp_path / "out", dequantize)
        torch.testing.assert_close(loaded(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)
        loaded.save_pretrained(tmp_path / "again")  # in its own way, with the names of the hub
        again = load_causal_lm(tmp_path / "again")
        torch.testing.assert_close(again(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)
