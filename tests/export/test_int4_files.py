"""Exports with 4-bit values through files: what is written, read in both ways, refused, and worked with by PEFT."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.export.quantizer import AstSparse24Config, CompressedLinear
from ast_sparse.report.overview import _kind
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.storage.files import read_json
from ast_sparse.storage.load import load_causal_lm, load_checkpoint
from tests.export.sparse_models import change_tensors, masked_state, sparse_model, token_ids
from tests.processes import run_python

FIRST = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.mlp.c_fc"}
FORMAT = "compressed-int4"


def load(folder: Path, dequantize: bool) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=AstSparse24Config(dequantize=dequantize))


def slow_weight(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Decode a layer of a file, entry by entry."""
    values, meta, scale = (tensors[f"{name}.{part}"] for part in ("weight", "weight_meta", "weight_scale"))
    rows, columns = values.shape[0], values.shape[1] * 4
    weight = torch.zeros(rows, columns, dtype=scale.dtype)
    for row in range(rows):
        for place in range(columns // 2):
            group = place // 2
            position = int(meta[row, group // 2]) >> (4 * (group % 2) + 2 * (place % 2)) & 3
            nibble = int(values[row, place // 2]) >> 4 * (place % 2) & 15
            column = 4 * group + position
            weight[row, column] = (nibble - 16 if nibble > 7 else nibble) * float(scale[row, column // 128])
    return weight + 0


@pytest.mark.parametrize("samples", [None, token_ids()], ids=["nearest", "awq"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_ways_of_loading_compute_with_the_weights_of_the_file(
    family: str, samples: Tensor | None, tmp_path: Path
) -> None:
    model = sparse_model(family)
    before = masked_state(model, torch.float32)
    report = export_model(model, tmp_path / "out", FORMAT, samples=samples)
    assert masked_state(model, torch.float32).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in masked_state(model, torch.float32).items())
    plain, packed = load(tmp_path / "out", True).eval(), load(tmp_path / "out", False).eval()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, CompressedLinear)}
    assert layers.keys() == sparse_layers(model).keys()
    for name, layer in layers.items():
        rows, columns = layer.out_features, layer.in_features
        stored = {key: tensors[f"{name}.{key}"] for key in ("weight", "weight_meta", "weight_scale")}
        assert [tuple(each.shape) for each in stored.values()] == [
            (rows, columns // 4),
            (rows, columns // 8),
            (rows, 1),
        ]
        assert all(torch.equal(each, getattr(layer, key)) for key, each in stored.items())
        assert layer.dtype == torch.bfloat16 and layer.weight.dtype == torch.uint8
        weight = slow_weight(tensors, name)
        assert torch.equal(layer.dense_weight(), weight)
        mask = sparse_layers(model)[name].mask
        dense, mask = plain.get_submodule(name).weight, mask.t() if family == "gpt2" else mask
        assert torch.equal(dense.t() if family == "gpt2" else dense, weight)
        assert not weight[~mask].any() and weight[mask].count_nonzero() > 0.8 * mask.sum()
    with torch.no_grad():
        assert torch.equal(packed(token_ids()).logits, plain(token_ids()).logits)
    bits = [line for line in report.lines() if line.startswith("bits for each pruned weight")]
    size = sum(tensors[f"{name}.{key}"].nbytes for name in layers for key in ("weight", "weight_meta", "weight_scale"))
    assert report.pruned.stored_bytes == size
    assert f"{8 * size / report.pruned.parameters:.3f}" in bits[0] and bits[0].endswith("without scales: 2.750")


def test_rounding_is_close_to_the_weights_and_awq_to_the_outputs(tmp_path: Path) -> None:
    model = sparse_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # some columns matter more
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.copy_(10 ** torch.randn(parameter.shape, generator=generator).clamp(-1, 1))
        expected = model(token_ids()).logits
    errors = {}
    for name, samples in (("nearest", None), ("awq", token_ids())):
        export_model(model, tmp_path / name, FORMAT, samples=samples, dtype="float32")
        with torch.no_grad():
            found = load_causal_lm(tmp_path / name).eval()(token_ids()).logits
        errors[name] = float((found - expected).norm() / expected.norm())
    assert errors["awq"] < 0.9 * errors["nearest"] and errors["nearest"] < 0.3
    state = load_causal_lm(tmp_path / "nearest").state_dict()
    for name, value in masked_state(model, torch.float32).items():
        if name.removesuffix(".weight") in sparse_layers(model):
            step = value.abs().amax(1, keepdim=True) / 8
            assert bool(((state[name] - value).abs() <= 1.61 * step).all())  # clipped by a fifth at most
        else:
            assert torch.equal(state[name], value)


@pytest.mark.parametrize("samples", [None, token_ids()], ids=["nearest", "awq"])
def test_slorb_stays_an_adapter_and_has_sixteen_values_in_a_group(samples: Tensor | None, tmp_path: Path) -> None:
    model = sparse_model(slorb_k=4)
    with torch.no_grad():
        expected = model(token_ids()).logits
    export_model(model, tmp_path / "out", FORMAT, samples=samples, dtype="float32")
    checkpoint = load_checkpoint(tmp_path / "out")
    assert checkpoint.slorb.keys() == sparse_layers(model).keys()
    for pair in checkpoint.slorb.values():
        for tensor in pair:
            assert all(len(row.unique()) <= 16 for row in tensor)  # no row has more than one group of 128 here
    with torch.no_grad():
        found = load_causal_lm(tmp_path / "out").eval()(token_ids()).logits
    assert float((found - expected).norm() / expected.norm()) < 0.3


def test_a_model_kept_compressed_is_saved_and_decoded_and_takes_another_dtype(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out", FORMAT)
    plain, packed = load(tmp_path / "out", True), load(tmp_path / "out", False)
    packed.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", True).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in plain.state_dict().items())
    kept = AstSparse24Config(dequantize=False)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=kept, dtype=torch.float16)
    layer = half.get_submodule(FIRST["llama"])
    assert layer.weight.dtype == torch.uint8 and layer.dense_weight().dtype == torch.float16
    assert half(token_ids()).logits.dtype == torch.float16
    decoded = packed.dequantize()
    assert not any(isinstance(module, CompressedLinear) for module in decoded.modules())
    assert all(torch.equal(value, decoded.state_dict()[name]) for name, value in plain.state_dict().items())


def test_layers_that_are_offloaded_to_disk_stay_compressed(tmp_path: Path) -> None:
    """transformers draws random values for a layer that is on no device, unless it is told not to."""
    export_model(sparse_model(), tmp_path / "out", FORMAT)
    places = dict.fromkeys(("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0"), "cpu")
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=AstSparse24Config(dequantize=False), offload_folder=tmp_path / "disk",
        device_map={**places, "model.layers.1": "disk"},
    )  # fmt: skip
    with torch.no_grad():
        logits, expected = (model(token_ids()).logits for model in (found, load(tmp_path / "out", False)))
    assert torch.equal(logits, expected)


def test_an_export_has_the_same_weights_when_it_is_exported_again(tmp_path: Path) -> None:
    export_model(sparse_model(slorb_k=8), tmp_path / "out", FORMAT, samples=token_ids())
    first = load_checkpoint(tmp_path / "out", dtype=torch.bfloat16)
    for name, format, samples in (("dense", "dense", None), ("near", FORMAT, None), ("awq", FORMAT, token_ids())):
        export_model(tmp_path / "out", tmp_path / name, format, samples=samples)
        again = load_checkpoint(tmp_path / name, dtype=torch.bfloat16)
        state = again.model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in first.model.state_dict().items())
        assert first.slorb and again.slorb.keys() == first.slorb.keys()
        assert all(
            torch.equal(a, b) for key in first.slorb for a, b in zip(first.slorb[key], again.slorb[key], strict=True)
        )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_works_on_layers_that_stay_compressed_and_merges(family: str, tmp_path: Path) -> None:
    export_model(sparse_model(family), tmp_path / "out", FORMAT, dtype="float32")
    targets = [FIRST[family].rpartition(".")[2]]
    config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=family == "gpt2", init_lora_weights=False)
    found = []
    for dequantize in (True, False):
        torch.manual_seed(0)
        model = peft.get_peft_model(load(tmp_path / "out", dequantize), config).eval()
        with torch.no_grad():
            found.append(model(token_ids()).logits)
            if not dequantize:
                assert any(isinstance(module, CompressedLinear) for module in model.modules())
            found.append(model.merge_and_unload()(token_ids()).logits)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def _bad_nibble(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.weight_meta"][1, 0] = 0x40


def _no_scale(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}.weight_scale"]


def _no_meta(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}.weight_meta"]


def _no_values(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}.weight"]


def _bad_scale(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.weight_scale"][0, 0] = float("nan")


def _float_values(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()


@pytest.mark.parametrize("damage", [_bad_nibble, _no_scale, _no_meta, _no_values, _bad_scale, _float_values])
def test_damaged_layer_is_named(damage, tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out", FORMAT)
    change_tensors(tmp_path / "out", lambda tensors: damage(tensors, FIRST["llama"]))
    with pytest.raises(ValueError, match=f"damaged: `{FIRST['llama']}`: "):
        load(tmp_path / "out", True)
    if damage is not _float_values:
        with pytest.raises(ValueError, match=f"damaged: `{FIRST['llama']}`: "):
            load(tmp_path / "out", False)


def test_any_changed_byte_of_the_values_is_found(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out", FORMAT)
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little") + header[f"{FIRST['llama']}.weight"]["data_offsets"][0]
    content[start] ^= 0x10
    file.write_bytes(content)
    for dequantize in (True, False):
        with pytest.raises((UserError, ValueError), match="checksum"):
            load(tmp_path / "out", dequantize)


def test_config_names_the_code_and_a_reader_without_the_plugin_stops(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out", FORMAT)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["format_version"]) == ("ast_sparse_24_int4", 1)
    assert FIRST["llama"] in settings["modules"]
    assert _kind(str(tmp_path / "out")) == "compressed 2:4, 4-bit values"
    assert read_json(tmp_path / "out" / "sparsity_config.json")["rounding"] == {"method": "nearest", "bits": 4}
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = run_python(code, tmp_path / "out", check=False)
    assert done.returncode != 0 and "ast_sparse_24_int4" in done.stderr
    with pytest.raises(UserError, match="ast_sparse_24_int4 format_version 2, newer than 1"):
        AstSparse24Config(quant_method="ast_sparse_24_int4", format_version=2)


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(samples=token_ids()), "samples: only compressed-int4 is calibrated"),
        (dict(format="compressed-int4", samples=token_ids()[0]), r"samples: the shape is \(12,\)"),
        (dict(adapter_samples=token_ids()), "adapter_samples: there is no adapter to merge"),
    ],
)
def test_text_without_effect_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        export_model(sparse_model(), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_layer_whose_dtype_the_model_asks_for_is_decoded_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export_model(sparse_model(), tmp_path / "out", FORMAT, dtype="float32")
    expected = load(tmp_path / "out", True)(token_ids()).logits

    def casting(self: Any, x: Tensor) -> Tensor:  # as DeepSeek-V3.2's indexer does
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).to(self.down_proj.weight.dtype))

    monkeypatch.setattr(LlamaMLP, "forward", casting)
    model = load(tmp_path / "out", False)
    compressed = {name for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    assert sorted(sparse_layers(sparse_model()).keys() - compressed) == [
        f"model.layers.{index}.mlp.down_proj" for index in range(2)
    ]
    torch.testing.assert_close(model(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again", False)(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)
