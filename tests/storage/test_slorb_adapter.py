"""SLoRB as a PEFT adapter: `W̃x + S(Xx)`, loaded by PEFT itself."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.export.quantizer import AstSparse24Config
from ast_sparse.sparsity.model import sparse_layers, sparsify_model
from ast_sparse.storage import slorb_adapter
from ast_sparse.storage.files import read_json, write_json
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.locate import Place
from ast_sparse.storage.slorb_adapter import read_adapter, write_adapter
from tests.export.sparse_models import change_tensors, sparse_model, token_ids
from tests.families import family_model


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return sparse_model(request.param, slorb_k=8)


@pytest.fixture
def exported(model: PreTrainedModel, tmp_path: Path) -> Path:
    export_model(model, tmp_path / "out", "compressed", dtype="float32")
    return tmp_path / "out"


def test_peft_computes_what_training_computed(model: PreTrainedModel, exported: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(exported)
    with_adapter = PeftModel.from_pretrained(base, exported / "slorb").eval()
    torch.testing.assert_close(with_adapter(token_ids()).logits, model(token_ids()).logits)
    scales = {module.scaling["default"] for module in with_adapter.modules() if hasattr(module, "lora_A")}
    assert scales == {1.0}


def test_ranks_differ_where_in_features_do(model: PreTrainedModel, exported: Path) -> None:
    layers = sparse_layers(model)
    expected = {name: layer.weight.shape[layer.group_dim] // 8 for name, layer in layers.items()}
    pairs = read_adapter(exported / "slorb")
    assert {name: x.shape[0] for name, (_, x) in pairs.items()} == expected and len(set(expected.values())) > 1
    for name, (s, x) in pairs.items():
        slorb = layers[name].slorb
        assert slorb is not None and torch.equal(s, slorb.S) and torch.equal(x, slorb.X)


def test_export_loads_its_sparse_weights_alone_with_peft_installed(model: PreTrainedModel, exported: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(exported)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    for layer in sparse_layers(model).values():
        layer.slorb = None
    assert torch.equal(plain(token_ids()).logits, model(token_ids()).logits)


def test_adapter_works_over_layers_that_stay_compressed(model: PreTrainedModel, exported: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(exported, quantization_config=AstSparse24Config(dequantize=False))
    # PEFT turns fan_in_fan_out off for them: in memory they are nn.Linear, whatever they were in the file.
    with_adapter = PeftModel.from_pretrained(packed, exported / "slorb").eval()
    torch.testing.assert_close(with_adapter(token_ids()).logits, model(token_ids()).logits)


def test_adapter_has_the_dtype_of_the_export(model: PreTrainedModel, tmp_path: Path) -> None:
    export_model(model, tmp_path / "out", "compressed", dtype="bfloat16")
    pairs = read_adapter(tmp_path / "out" / "slorb")
    assert {tensor.dtype for pair in pairs.values() for tensor in pair} == {torch.bfloat16}


def test_adapter_that_scales_is_refused(exported: Path) -> None:
    config = read_json(exported / "slorb" / "adapter_config.json")
    config["lora_alpha"] *= 2
    write_json(exported / "slorb" / "adapter_config.json", config)
    with pytest.raises(UserError, match="the scale alpha / r is not 1"):
        load_causal_lm(exported)


@pytest.mark.parametrize("change", [{"lora_alpha": 1}, {"alpha_pattern": {"a": 1}}, {"use_rslora": True}])
def test_description_of_another_scale_is_refused(exported: Path, change: dict[str, object]) -> None:
    path = exported / "slorb/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match="the scale alpha / r is not 1"):
        load_causal_lm(exported)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, "base", {"layer": (torch.ones(4, 2), torch.ones(2, 8))})
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "model.safetensors")
    change_tensors(tmp_path, lambda tensors: tensors.pop("base_model.model.layer.lora_B.weight"))
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lacks the tensor 'base_model.model.layer.lora_B.weight'"):
        read_adapter(tmp_path)


def test_missing_peft_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ast-sparse\[slorb\]'"):
        load_causal_lm(exported)


@pytest.mark.parametrize("family", ["deepseek_v3", "hunyuan_v1_moe", "qwen3_next"])
def test_layers_whose_adapter_peft_would_give_to_joined_experts_have_none(family: str, tmp_path: Path) -> None:
    model = family_model(family).eval()
    report = sparsify_model(model, SparsityConfig(), SLoRBConfig(enabled=True, k=8))
    assert report.without_slorb and len(report.without_slorb) < len(report.pruned)
    assert all(name.endswith(("gate_proj", "up_proj", "down_proj")) for name in report.without_slorb)
    export_model(model, tmp_path / "out", dtype="float32")
    expected = model(token_ids()).logits
    torch.testing.assert_close(load_causal_lm(tmp_path / "out")(token_ids()).logits, expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "out" / "slorb").eval()
    torch.testing.assert_close(with_adapter(token_ids()).logits, expected)


def test_an_adapter_that_peft_does_not_place_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ast_sparse.sparsity.model.takes_slorb", lambda model, name: True)  # as earlier versions did
    model = family_model("deepseek_v3")
    sparsify_model(model, SparsityConfig(), SLoRBConfig(enabled=True, k=8))
    export_model(model, tmp_path / "out")
    with pytest.raises(UserError, match=r"PEFT does not load the pair of `model\.layers\.0\.mlp\.\w+`"):
        load_causal_lm(tmp_path / "out")


def test_a_hub_that_does_not_say_whether_there_is_an_adapter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(slorb_adapter, "cached_file", lambda *_, **__: None)  # what it returns for a failed request
    monkeypatch.setattr(slorb_adapter.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(slorb_adapter.logger, "warning", said.append)
    assert slorb_adapter.adapter_home(Place.find("org/tiny", None), None) is None
    assert len(said) == 1 and "`org/tiny`: the hub was asked for sparsity_config.json without success" in said[0]
    monkeypatch.setattr(slorb_adapter, "try_to_load_from_cache", lambda *_, **__: slorb_adapter._CACHED_NO_EXIST)
    assert slorb_adapter.adapter_home(Place.find("org/tiny", None), None) is None
    assert len(said) == 1  # the hub has said no before
