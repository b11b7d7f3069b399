"""The checksums of a folder: written with it, compared when it is read, and absent from older folders."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.export.quantizer import AstSparse24Config
from ast_sparse.storage.checksums import check_checksums, write_checksums
from ast_sparse.storage.files import weight_files
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.save import save_sparse_model
from tests.export.sparse_models import sparse_model
from tests.fuzz.mutate import read_safetensors, shard, write_safetensors

Q, V = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"  # of equal shape


@pytest.fixture(params=["saved", "dense", "compressed"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "saved":
        save_sparse_model(sparse_model(slorb_k=8), tmp_path / "out", {})
    else:
        export_model(sparse_model(slorb_k=8), tmp_path / "out", request.param)
    return tmp_path / "out"


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)


def swap(file: Path) -> None:
    header, data = read_safetensors(file)
    header[Q], header[V] = header[V], header[Q]
    write_safetensors(file, header, data)


def test_sum_is_the_crc_of_dtype_shape_and_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(600_000, dtype=torch.int64), "b": torch.ones(2, 3), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    write_checksums(tmp_path)
    kinds = {"a": "I64 [600000]", "b": "F32 [2, 3]", "c": "F32 [0]"}
    expected = {name: f"{zlib.crc32(kinds[name].encode() + tensors[name].numpy().tobytes()):08x}" for name in tensors}
    content = json.loads((tmp_path / "checksums.json").read_text())
    assert content == {"format_version": 1, "algorithm": "crc32", "tensors": expected}


def test_flipped_bit_is_named_with_its_tensor(folder: Path) -> None:
    load_causal_lm(folder)
    flip(folder / "model.safetensors", -1)
    with pytest.raises(UserError, match=r"model\.safetensors` is damaged: `model\..*` does not have the checksum"):
        load_causal_lm(folder)


def test_tensors_of_equal_shape_that_changed_places_are_noticed(folder: Path) -> None:
    swap(folder / "model.safetensors")
    with pytest.raises(UserError, match=f"`({Q}|{V})` does not have the checksum"):
        load_causal_lm(folder)


def test_flipped_bit_of_the_adapter_is_noticed(folder: Path) -> None:
    flip(folder / "slorb/adapter_model.safetensors", -1)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors` is damaged: `base_model"):
        load_causal_lm(folder)


@pytest.mark.parametrize("dequantize", [True, False])
def test_transformers_alone_notices_it_in_a_compressed_export(tmp_path: Path, dequantize: bool) -> None:
    export_model(sparse_model(), tmp_path / "out")
    flip(tmp_path / "out/model.safetensors", -1)
    with pytest.raises(UserError, match="does not have the checksum"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", quantization_config=AstSparse24Config(dequantize=dequantize)
        )


def test_folder_without_checksums_is_read_as_before(folder: Path) -> None:
    (folder / "checksums.json").unlink()
    (folder / "slorb/checksums.json").unlink()
    flip(folder / "model.safetensors", -1)
    load_causal_lm(folder)


def test_added_missing_and_unreadable_sums_are_named(tmp_path: Path) -> None:
    file, sums = tmp_path / "model.safetensors", tmp_path / "checksums.json"
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, file)
    write_checksums(tmp_path)
    check_checksums(tmp_path, [file])
    save_file({"a": torch.ones(2)}, file)
    with pytest.raises(UserError, match="lacks the tensor 'b'"):
        check_checksums(tmp_path, [file])
    save_file({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, file)
    with pytest.raises(UserError, match=r"holds `c`, which checksums\.json does not list"):
        check_checksums(tmp_path, [file])
    sums.write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="format_version 2, newer than 1"):
        check_checksums(tmp_path, [file])
    sums.write_text("{}")
    with pytest.raises(UserError, match="holds no checksums"):
        check_checksums(tmp_path, [file])


def test_sums_of_shards_stand_in_one_file(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out", "dense")
    shard(tmp_path / "out")  # the sums are by tensor, whatever the file
    load_causal_lm(tmp_path / "out")
    last = weight_files(tmp_path / "out")[-1]
    flip(last, -1)
    with pytest.raises(UserError, match="model-00002-of-00002"):
        load_causal_lm(tmp_path / "out")


def test_folder_that_is_written_again_gets_the_sums_of_the_new_weights(tmp_path: Path) -> None:
    for seed in range(2):
        save_sparse_model(sparse_model(seed=seed), tmp_path, {})
        load_causal_lm(tmp_path)
