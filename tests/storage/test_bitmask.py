"""Sparse formats of compressed-tensors, with bytes written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from ast_sparse.cli.eval import main as evaluate
from ast_sparse.cli.export import main as export
from ast_sparse.cli.prune import main as prune
from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.storage.bitmask import decode_bitmask
from ast_sparse.storage.files import read_json
from ast_sparse.storage.load import load_causal_lm
from tests.export.sparse_models import change_tensors, sparse_model
from tests.models import generated_text, tiny_tokenizer
from tests.storage.quantized_models import edit_config


def sparse_section(format: str = "sparse-24-bitmask") -> dict[str, Any]:
    """As llm-compressor writes it for Sparse-Llama-3.1-8B-2of4."""
    return {
        "format": format, "global_sparsity": 0.42, "ignore": ["lm_head"], "registry_requires_subclass": False,
        "sparsity_structure": "2:4", "targets": ["Linear"],
    }  # fmt: skip


def settings(format: str = "sparse-24-bitmask", **more: Any) -> dict[str, Any]:
    section = {"sparsity_config": sparse_section(format), "transform_config": {}, "version": "0.14.0"}
    return {"quant_method": "compressed-tensors", **section, **more}


def packed(mask: Tensor) -> Tensor:
    """The bits of a mask, one loop for each of its rows, columns and bits."""
    rows, columns = mask.shape
    result = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            if mask[row, column]:
                result[row, column // 8] += 2 ** (column % 8)
    return result


def store(tensors: dict[str, Tensor], format: str) -> None:
    """Store the layers of the blocks in one of the two formats."""
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight, layer = tensors.pop(name), name.removesuffix(".weight")
        mask = weight != 0
        rows = torch.tensor([int(row.sum()) for row in mask])
        values = torch.cat([row[kept] for row, kept in zip(weight, mask, strict=True)])
        tensors[f"{layer}.bitmask"] = packed(mask)
        if format == "sparse-bitmask":
            tensors[f"{layer}.compressed"], tensors[f"{layer}.shape"] = values, torch.tensor(weight.shape)
            tensors[f"{layer}.row_offsets"] = rows.cumsum(0) - rows
        else:
            tensors[f"{layer}.compressed"] = values.view(weight.shape[0], -1)
            tensors[f"{layer}.shape"] = torch.tensor(weight.shape).view(2, 1)


def store_as_0_5_does(tensors: dict[str, Tensor]) -> None:
    """Store every tensor in the bits of its non-zeros, under its whole name."""
    for name, value in list(tensors.items()):
        mask = value != 0
        counts = mask.sum(-1)
        offsets = torch.cumsum(counts, 0) - counts
        bits = packed(mask[None])[0] if value.dim() == 1 else packed(mask)
        parts = {"compressed": value[mask], "bitmask": bits, "row_offsets": offsets, "shape": torch.tensor(value.shape)}
        tensors.update({f"{name}.{part}": each for part, each in parts.items()})
        del tensors[name]


def save(folder: Path, format: str = "sparse-24-bitmask", dtype: str = "bfloat16") -> dict[str, Tensor]:
    """Write a folder as others publish it; return its weights by name."""
    export_model(sparse_model(), folder, "dense", dtype=dtype, tokenizer=tiny_tokenizer())
    (folder / "sparsity_config.json").unlink()
    meant = load_file(folder / "model.safetensors")
    if format != "dense":
        change_tensors(folder, lambda tensors: store(tensors, format))
    edit_config(folder, quantization_config=settings(format))
    (folder / "checksums.json").unlink(missing_ok=True)
    return meant


def test_the_bytes_of_a_small_weight() -> None:
    values = torch.tensor([1, -2, 3, 4, 5, -6, 7, 8, 9, 10, -0.5, 11.0]).bfloat16().view(2, 6)
    bits = torch.tensor([[0b1001_0011, 0b0000_1010], [0b0110_1100, 0b0000_0101]], dtype=torch.uint8)
    expected = torch.tensor([
        [1, -2, 0, 0, 3, 0, 0, 4, 0, 5, 0, -6],
        [0, 0, 7, 8, 0, 9, 10, 0, -0.5, 0, 11, 0],
    ]).bfloat16()  # fmt: skip
    assert torch.equal(decode_bitmask(values, bits, torch.tensor([[2], [12]])), expected)
    flat, shape = values.flatten(), torch.tensor([2, 12])
    assert torch.equal(decode_bitmask(flat, bits, shape), expected)
    assert torch.equal(decode_bitmask(flat, bits, shape, torch.tensor([0, 6])), expected)
    with pytest.raises(ValueError, match="its `row_offsets` do not fit its bitmask"):
        decode_bitmask(flat, bits, shape, torch.tensor([0, 5]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["sparse-24-bitmask", "sparse-bitmask", "dense"])
def test_a_published_folder_is_loaded_and_exported(format: str, dtype: str, tmp_path: Path) -> None:
    meant = save(tmp_path / "theirs", format, dtype)
    model = load_causal_lm(tmp_path / "theirs", dtype="auto")
    found = model.state_dict()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in meant.items())
    assert not hasattr(model.config, "quantization_config")
    result = CliRunner().invoke(export, [str(tmp_path / "theirs"), str(tmp_path / "out"), "--dtype", dtype])
    assert result.exit_code == 0, result.output
    assert "pruned (2:4)" in result.stdout
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["quant_method"] == "ast_sparse_24"
    again = load_causal_lm(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(again[name], value) for name, value in meant.items())


def test_the_parts_of_a_layer_may_lie_in_several_files(tmp_path: Path) -> None:
    meant = save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found = load_causal_lm(tmp_path, dtype="auto").state_dict()
    assert all(torch.equal(found[name], value) for name, value in meant.items())


@pytest.mark.parametrize("format", ["dense", "sparse-bitmask"])
def test_older_models_call_the_section_compression_config(format: str, tmp_path: Path) -> None:
    meant = save(tmp_path / "theirs", format)
    section = {"sparsity_config": {**sparse_section(format), "sparsity_structure": "unstructured"}}
    edit_config(tmp_path / "theirs", quantization_config=None, compression_config=section)
    found = load_causal_lm(tmp_path / "theirs", dtype="auto").state_dict()
    assert all(torch.equal(found[name], value) for name, value in meant.items())
    export_model(tmp_path / "theirs", tmp_path / "out", "dense")
    config = read_json(tmp_path / "out" / "config.json")
    assert "compression_config" not in config and "quantization_config" not in config


@pytest.mark.parametrize("family", ["llama", "opt"])  # the second has biases
def test_files_of_version_0_5(family: str, tmp_path: Path) -> None:
    export_model(sparse_model(family), tmp_path / "theirs", "dense", dtype="bfloat16")
    meant = load_file(tmp_path / "theirs" / "model.safetensors")
    change_tensors(tmp_path / "theirs", store_as_0_5_does)
    section = {"sparsity_config": {**sparse_section("sparse-bitmask"), "sparsity_structure": "unstructured"}}
    edit_config(tmp_path / "theirs", compression_config=section)
    found = load_causal_lm(tmp_path / "theirs", dtype="auto").state_dict()
    assert all(torch.equal(found[name], value) for name, value in meant.items())


def test_ast_eval_and_ast_prune_read_it(tmp_path: Path) -> None:
    save(tmp_path / "theirs")
    (tmp_path / "text.txt").write_text(generated_text(10))
    options = ["--dataset", str(tmp_path / "text.txt"), "--seq-len", "32", "--limit", "1", "--device", "cpu"]
    result = CliRunner().invoke(evaluate, [str(tmp_path / "theirs"), *options])
    assert result.exit_code == 0, result.output
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "out"), "--method", "magnitude", "--pattern", "1:4"]
    result = CliRunner().invoke(prune, arguments)
    assert result.exit_code == 0, result.output
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")


LAYER = "model.layers.0.mlp.up_proj"


def _remove(part: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(f"{LAYER}.{part}")


def _change(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({f"{LAYER}.{part}": change(tensors[f"{LAYER}.{part}"])})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "bitmask": (_remove("bitmask"), "the checkpoint lacks its `bitmask`"),
    "values": (_remove("compressed"), "the checkpoint lacks its `compressed`"),
    "bit": (_change("bitmask", lambda bits: bits | 1), r"its bitmask keeps \d+ weights, but 768 values are stored"),
    "moved": (_change("bitmask", lambda bits: bits << 1 | bits >> 7), "its bitmask does not keep 2 of every 4 weights"),
    "rows": (_change("bitmask", lambda bits: bits[1:]), r"a bitmask of \[47, 4\] does not fit shape \[48, 32\]"),
    "shape": (_change("shape", lambda shape: shape.flip(0)), r"does not fit shape \[32, 48\]"),
    "negative": (_change("shape", lambda shape: -shape), r"shape \[-48, -32\] .* make no weight"),
    "fp8": (
        _change("compressed", lambda values: values.to(torch.float8_e4m3fn)),
        r"its values are torch\.float8_e4m3fn, and only bfloat16",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_that_names_the_layer(case: str, tmp_path: Path) -> None:
    change, message = DAMAGE[case]
    save(tmp_path / "theirs")
    change_tensors(tmp_path / "theirs", change)
    with pytest.raises(UserError, match=message) as caught:
        load_causal_lm(tmp_path / "theirs")
    assert "\n" not in str(caught.value) and f"`{LAYER}.weight`" in str(caught.value)


GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quantized": (settings(config_groups=GROUPS), "is quantized and stored as sparse-24-bitmask, and only bfloat16"),
    "rotated": (
        settings(transform_config={"R1": {}}),
        r"is transformed \(`transform_config`\) and stored as sparse-24",
    ),
    "unknown": (settings("sparse-48"), "is stored in the sparse format 'sparse-48', which is not read"),
    "kind": (settings() | {"sparsity_config": "2:4"}, "sparsity_config='2:4' is not a mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_formats_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    save(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", quantization_config=REFUSED[case][0])
    with pytest.raises(UserError, match=REFUSED[case][1]) as caught:
        load_causal_lm(tmp_path / "theirs")
    assert "\n" not in str(caught.value)
