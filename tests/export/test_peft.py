"""PEFT over layers that stay compressed: each method compared with the same model decoded."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.export.quantizer import AstSparse24Config, CompressedLinear
from ast_sparse.kernels.native import products24
from tests.export.sparse_models import sparse_model, token_ids

TARGETS = {"llama": ["q_proj", "o_proj", "up_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("peft")
    for family in TARGETS:
        export_model(sparse_model(family), root / family, "compressed", dtype="float32")
    return {family: root / family for family in TARGETS}


def load(folder: Path, dequantize: bool) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=AstSparse24Config(dequantize=dequantize))


def compressed(model: torch.nn.Module) -> set[str]:
    layers = {name for name, layer in model.named_modules() if isinstance(layer, CompressedLinear)}
    return {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in layers}


def lora(family: str, **settings: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2", **settings)


def adapted(model: PreTrainedModel, config: Any) -> Any:
    """The model with an adapter that is not zero, the same in each call."""
    torch.manual_seed(0)
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(token_ids()).logits


@pytest.fixture(autouse=True)
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides call `F.linear`, so that what they compute is equal to the bit."""
    monkeypatch.setattr(products24, "kernels", lambda: None)


AFTER: dict[str, Callable[[Any], Any]] = {
    "attached": lambda model: model,
    "merged": lambda model: model.merge_and_unload(),
    "merged safely": lambda model: model.merge_and_unload(safe_merge=True),
    "merged in place": lambda model: (model.merge_adapter(), model)[1],
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter(), model)[2],
    "unloaded": lambda model: model.unload(),
}
LORA: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"}, "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"}, "orthogonal": {"init_lora_weights": "orthogonal"}, "bias": {"bias": "all"},
}  # fmt: skip


# PEFT's OLoRA reads the weight of a Conv1D the wrong way round.
CASES = [(kind, after, "llama") for kind in LORA for after in AFTER if kind in ("plain", "dora", "pissa")]
CASES += [(kind, "merged", "llama") for kind in LORA if kind not in ("plain", "dora", "pissa")]
CASES += [(kind, "merged", "gpt2") for kind in LORA if kind != "olora"]


@pytest.mark.parametrize(("kind", "after", "family"), CASES)
def test_lora_equals_that_over_the_decoded_model(kind: str, after: str, family: str, exports: dict[str, Path]) -> None:
    found, expected = (
        logits(AFTER[after](adapted(load(exports[family], dequantize), lora(family, **LORA[kind]))))
        for dequantize in (False, True)
    )
    if family == "gpt2":  # decoded it is a Conv1D, which multiplies in another order
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


METHODS: dict[str, dict[str, Any]] = {
    "VeraConfig": {"r": 4}, "IA3Config": {"feedforward_modules": ["down_proj"]}, "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4}, "AdaLoraConfig": {"r": 4, "total_step": 10}, "OFTConfig": {"r": 0, "oft_block_size": 4},
    "HRAConfig": {"r": 4}, "MissConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 8}, "VBLoRAConfig": {"r": 4, "num_vectors": 8, "vector_length": 4},
    "C3AConfig": {"block_size": 8}, "RandLoraConfig": {"r": 4},
}  # fmt: skip


@pytest.mark.parametrize("after", ["attached", "merged", "unloaded"])
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_equal_those_over_the_decoded_model(method: str, after: str, exports: dict[str, Path]) -> None:
    config = getattr(peft, method)(target_modules=TARGETS["llama"], **METHODS[method])
    found, expected = (
        logits(AFTER[after](adapted(load(exports["llama"], dequantize), copy.deepcopy(config))))
        for dequantize in (False, True)
    )
    assert torch.equal(found, expected)


def test_a_lora_adapter_is_trained_over_layers_that_stay_compressed(exports: dict[str, Path]) -> None:
    model = load(exports["llama"], dequantize=False)
    before = compressed(model)
    wrapped = adapted(model, lora("llama")).train()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    first = wrapped(token_ids(), labels=token_ids()).loss
    first.backward()
    optimizer.step()
    assert wrapped(token_ids(), labels=token_ids()).loss < first
    assert compressed(wrapped) == before and len(before) == 14


def test_only_the_layers_that_are_merged_are_decoded_and_both_are_saved(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    merged = adapted(load(exports["llama"], dequantize=False), config).merge_and_unload()
    left = compressed(merged)
    assert len(left) == 12 and not any("q_proj" in name for name in left)
    merged.save_pretrained(tmp_path / "mixed")
    for dequantize in (False, True):
        again = load(tmp_path / "mixed", dequantize)
        assert torch.equal(logits(again), logits(merged)) and compressed(again) == (set() if dequantize else left)
    everything = adapted(load(exports["llama"], dequantize=False), LoraConfig(r=4, target_modules="all-linear"))
    plain = everything.merge_and_unload()
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), logits(plain))


@pytest.mark.parametrize("targets", [["attn.c_proj"], ["c_attn", "c_fc"], TARGETS["gpt2"]], ids=str)
def test_merged_layers_of_gpt2_are_saved_in_its_layout(
    targets: list[str], exports: dict[str, Path], tmp_path: Path
) -> None:
    merged = adapted(
        load(exports["gpt2"], dequantize=False), LoraConfig(r=4, target_modules=targets)
    ).merge_and_unload()
    expected = logits(merged)
    for folder in ("once", "twice"):
        merged.save_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-6)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-6)


def test_an_unloaded_model_takes_another_adapter_and_can_be_saved(exports: dict[str, Path], tmp_path: Path) -> None:
    model = load(exports["llama"], dequantize=False)
    before, layers = logits(model), compressed(model)
    model = adapted(model, lora("llama")).unload()
    assert torch.equal(logits(model), before) and compressed(model) == layers
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out", dequantize=True)), before)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    again = adapted(model, lora("llama"))
    expected = adapted(load(exports["llama"], dequantize=True), lora("llama"))
    assert torch.equal(logits(again.merge_and_unload()), logits(expected.merge_and_unload()))


def test_a_compressed_module_to_save_is_trained_with_its_zeros(exports: dict[str, Path]) -> None:
    def gradient(dequantize: bool) -> tuple[Any, Tensor]:
        config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
        model = get_peft_model(load(exports["llama"], dequantize), config)
        layer = model.base_model.model.model.layers[0].mlp.down_proj.modules_to_save["default"]
        torch.manual_seed(0)
        model(token_ids(), labels=token_ids()).loss.backward()
        return layer, layer.weight.grad

    layer, found = gradient(False)
    dense, expected = gradient(True)
    kept = dense.weight != 0
    assert torch.equal(found.flatten(), expected[kept].flatten()) and found.shape == layer.weight.shape


def test_a_targeted_parameter_of_a_compressed_layer_is_one_clear_error(exports: dict[str, Path]) -> None:
    config = LoraConfig(r=4, target_modules=[], target_parameters=["o_proj.weight"])
    with pytest.raises(UserError, match=r"target_parameters.*`dequantize=True`"):
        logits(get_peft_model(load(exports["llama"], dequantize=False), config))
