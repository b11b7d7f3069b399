"""What a new export codec needs: its file, and an entry in the tables of `formats`.

A made-up one for 1:4 that is added this way is written, verified, read and named like the one of the package.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

from ast_sparse import AstSparse24Config, UserError
from ast_sparse.cli import export
from ast_sparse.export import quantizer
from ast_sparse.export.codec import Codec
from ast_sparse.export.export import export_model
from ast_sparse.export.formats import CALIBRATED, FORMAT_HELP, codec_of, codecs
from ast_sparse.export.quantizer import CompressedLinear
from ast_sparse.report.overview import _kind
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.storage.files import tensor_shapes
from ast_sparse.storage.load import load_causal_lm
from tests.export.sparse_models import change_tensors, masked_state, sparse_model, token_ids

PLACES = 2 * torch.arange(4)  # two bits per position, four positions per byte


def encode14(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    groups = (weight != 0 if mask is None else mask).unflatten(1, (-1, 4))
    at = groups.to(torch.uint8).argmax(-1, keepdim=True)
    values = weight.unflatten(1, (-1, 4)).gather(-1, at).squeeze(-1)
    return values, (at.squeeze(-1).unflatten(1, (-1, 4)) << PLACES).sum(-1).to(torch.uint8)


def decode14(values: Tensor, meta: Tensor) -> Tensor:
    at = (meta.unsqueeze(-1) >> PLACES & 3).flatten(1).long().unsqueeze(-1)
    return values.new_zeros(*values.shape, 4).scatter(-1, at, values.unsqueeze(-1)).flatten(1)


CODE14 = Codec(
    method="made_up_14", format_version=2, pattern=Pattern(1, 4), multiple=16, columns_per_byte=16,
    encode=encode14, decode=decode14, check_meta=lambda meta: not bool((meta == 255).all()),
)  # fmt: skip


def test_the_formats_that_are_calibrated_are_those_whose_codec_rounds() -> None:
    assert tuple(name for name, codec in codecs().items() if codec.round is not None) == CALIBRATED


@pytest.fixture
def format14(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(FORMAT_HELP, "small", "1:4 only")
    monkeypatch.setitem(codecs(), "small", CODE14)
    option = next(parameter for parameter in export.main.params if parameter.name == "format_")
    monkeypatch.setattr(option, "type", click.Choice(list(FORMAT_HELP)))
    quantizer.register()
    yield "small"
    del auto.AUTO_QUANTIZER_MAPPING[CODE14.method], auto.AUTO_QUANTIZATION_CONFIG_MAPPING[CODE14.method]


def load(folder: Path, dequantize: bool) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=AstSparse24Config(dequantize=dequantize))


def test_every_format_has_a_line_of_help_and_all_but_dense_a_codec() -> None:
    assert set(FORMAT_HELP) == {"dense", *codecs()}
    assert all(codec_of(codec.method) is codec for codec in codecs().values())
    assert len({codec.method for codec in codecs().values()}) == len(codecs())
    assert codec_of("fp8") is None and codec_of(None) is None


def test_every_codec_is_known_to_transformers() -> None:
    for codec in codecs().values():
        assert auto.AUTO_QUANTIZER_MAPPING[codec.method] is quantizer.CompressedHfQuantizer
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING[codec.method] is AstSparse24Config


@pytest.mark.parametrize("codec", [*codecs().values(), CODE14], ids=lambda codec: codec.method)
def test_every_codec_multiplies_with_slorb(codec: Codec) -> None:
    torch.manual_seed(0)
    weight = codec.pattern.mask(torch.rand(6, 64)) * torch.randn(6, 64)
    rounded, *scales = (weight,) if codec.round is None else codec.round(weight)
    stored = codec.encode(rounded, None, *scales)
    x, bias, s, projection = torch.randn(3, 64), torch.randn(6), torch.randn(6, 5), torch.randn(5, 64)
    found = codec.linear(x, *stored[:2], bias, *stored[2:], slorb=(s, projection))
    expected = x.double() @ (codec.decode(*stored).double() + s.double() @ projection.double()).T + bias
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", [*codecs().values(), CODE14], ids=lambda codec: codec.method)
def test_every_codec_gives_back_its_weights_in_the_shapes_and_bytes_it_says(codec: Codec, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4 * codec.multiple, generator=generator).to(dtype)
    mask = codec.pattern.mask(torch.rand(weight.shape, generator=generator))
    weight[0] = 0  # zeros that the mask keeps are kept
    masked, scales = torch.where(mask, weight, 0), ()
    if codec.round is not None:  # the codec holds only some weights
        masked, *scales = codec.round(masked)
        assert masked.dtype == dtype and not masked[~mask].any()
    for given in (mask, None):
        stored = codec.encode(masked, given, *scales)
        assert len(stored) == len(codec.names) and codec.names[:2] == ("weight", "weight_meta")
        assert tuple(each.shape for each in stored) == codec.shapes(*weight.shape)
        assert tuple(each.dtype for each in stored) == codec.dtypes(dtype) and stored[1].dtype == torch.uint8
        assert sum(each.nbytes for each in stored) == codec.stored_bytes(*weight.shape, dtype.itemsize)
        codec.check(*stored)
        assert codec.dense_shape(stored[0]) == weight.shape
        assert torch.equal(codec.decode(*stored), masked)
    values, meta, *scales = codec.encode(masked, mask, *scales)
    ones = torch.full_like(values, 1 if codec.value_bits is None else 0x11)
    assert torch.equal(codec.decode(ones, meta, *(torch.ones_like(each) for each in scales)) != 0, mask)
    for wrong in (meta[:, :-1], meta[:-1], meta.int()):
        with pytest.raises(ValueError, match="does not fit values"):
            codec.check(values, wrong, *scales)


@pytest.mark.parametrize("codec", [*codecs().values(), CODE14], ids=lambda codec: codec.method)
def test_a_layer_cut_at_the_multiple_that_a_codec_names_is_two_codes_side_by_side(codec: Codec) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5 * codec.cut, generator=generator)
    masked, scales = torch.where(codec.pattern.mask(weight.abs()), weight, 0), ()
    if codec.round is not None:
        masked, *scales = codec.round(masked)
    stored = codec.encode(masked, None, *scales)
    parts = [
        [each[:, : 2 * each.shape[1] // 5] for each in stored],
        [each[:, 2 * each.shape[1] // 5 :] for each in stored],
    ]
    for part, columns in zip(parts, masked.split([2 * codec.cut, 3 * codec.cut], dim=1), strict=True):
        assert tuple(each.shape for each in part) == codec.shapes(*columns.shape)
        assert torch.equal(codec.decode(*part), columns)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_new_codec_gives_back_the_masked_weights_to_the_bit(family: str, format14: str, tmp_path: Path) -> None:
    model = sparse_model(family, pattern="1:4")
    report = export_model(model, tmp_path / "out", format14)
    assert report.format == "small" and not report.dense_layers
    assert report.pruned.stored_bytes * 16 == report.pruned.parameters * (4 * 2 + 1)
    expected = masked_state(model, torch.bfloat16)
    for found in (AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load_causal_lm(tmp_path / "out")):
        assert all(torch.equal(value, expected[name].to(value.dtype)) for name, value in found.state_dict().items())
    assert _kind(str(tmp_path / "out")) == "compressed 1:4"


def test_the_files_of_a_new_codec_name_it_and_have_its_shapes(format14: str, tmp_path: Path) -> None:
    model = sparse_model(pattern="1:4")
    export_model(model, tmp_path / "out", format14)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["format_version"]) == ("made_up_14", 2)
    shapes = tensor_shapes(tmp_path / "out" / "model.safetensors")
    for name, layer in sparse_layers(model).items():
        rows, columns = layer.weight.shape
        assert shapes[f"{name}.weight"] == ("BF16", [rows, columns // 4])
        assert shapes[f"{name}.weight_meta"] == ("U8", [rows, columns // 16])


def test_layers_of_a_new_codec_stay_compressed_in_memory(format14: str, tmp_path: Path) -> None:
    export_model(sparse_model(pattern="1:4"), tmp_path / "out", format14)
    packed, plain = load(tmp_path / "out", False), load(tmp_path / "out", True)
    layers = [layer for layer in packed.modules() if isinstance(layer, CompressedLinear)]
    assert layers and all(layer.codec is CODE14 for layer in layers)
    assert not any(isinstance(layer, CompressedLinear) for layer in plain.modules())
    with torch.no_grad():
        assert torch.equal(packed(token_ids()).logits, plain(token_ids()).logits)
    packed.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again", False)(token_ids()).logits, plain(token_ids()).logits)


def test_a_new_codec_is_chosen_by_command_and_refuses_another_pattern(format14: str, tmp_path: Path) -> None:
    export_model(sparse_model(pattern="1:4"), tmp_path / "dense", "dense")
    done = CliRunner().invoke(export.main, [str(tmp_path / "dense"), str(tmp_path / "out"), "--format", "small"])
    assert done.exit_code == 0, done.output
    with pytest.raises(UserError, match=r"The small format holds 1:4, but the model is 2:4: .* Use --format dense"):
        export_model(sparse_model(), tmp_path / "other", format14)
    with pytest.raises(UserError, match=f"Use {' or '.join(FORMAT_HELP)}"):
        export_model(sparse_model(), tmp_path / "other", "tiny")


def test_damaged_metadata_and_newer_versions_of_a_new_codec_are_refused(format14: str, tmp_path: Path) -> None:
    export_model(sparse_model(pattern="1:4"), tmp_path / "out", format14)
    name = "model.layers.0.mlp.up_proj.weight_meta"

    def damage(tensors: dict[str, Any]) -> None:
        tensors[name] = torch.full_like(tensors[name], 255)

    change_tensors(tmp_path / "out", damage)
    for dequantize in (True, False):
        with pytest.raises(ValueError, match="positions that no 1:4 group has"):
            load(tmp_path / "out", dequantize)
    with pytest.raises(UserError, match="made_up_14 format_version 3, newer than 2"):
        AstSparse24Config(quant_method="made_up_14", format_version=3)


def test_a_code_that_is_not_ours_is_refused() -> None:
    with pytest.raises(UserError, match=r"quant_method=.made_up_14. is not a code of ast_sparse\. Use .ast_sparse_24."):
        AstSparse24Config(quant_method="made_up_14")
