"""Bytes of weights, against the tensors of the loaded model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, MixtralConfig

from ast_sparse.export.quantizer import AstSparse24Config
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.speed.bytes_read import WeightBytes, fingerprint, is_compressed, weight_bytes
from tests.export.sparse_models import save_run_checkpoint, sparse_model
from tests.speed.sides import write_exports


def held(folder: Path, dtype: torch.dtype, *, compressed: bool) -> WeightBytes:
    """The slow twin: load the model and add up its tensors."""
    settings = {"quantization_config": AstSparse24Config(dequantize=False)} if compressed else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings)
    metadata = [buffer for name, buffer in model.named_buffers() if name.endswith("weight_meta")]
    tensors = {each.data_ptr(): each for each in (*model.parameters(), *metadata)}.values()
    total = sum(each.numel() * each.element_size() for each in tensors)
    head = model.get_output_embeddings().weight.data_ptr()
    tables = [each.weight for each in model.modules() if isinstance(each, torch.nn.Embedding)]  # gpt2: positions too
    return WeightBytes(total, total - sum(table.nbytes for table in tables if table.data_ptr() != head))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # the first and the last have tied embeddings
def test_bytes_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    folder = write_exports(tmp_path, family)
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("compressed", "dense"):
            assert weight_bytes(folder / name, dtype) == held(folder / name, dtype, compressed=name == "compressed")
        decoded = weight_bytes(folder / "compressed", dtype, decoded=True)
        assert decoded == held(folder / "compressed", dtype, compressed=False) == weight_bytes(folder / "dense", dtype)


def test_an_adapter_counts_unless_it_is_not_loaded(tmp_path: Path) -> None:
    folder = write_exports(tmp_path, slorb_k=8)
    with_it, without = (weight_bytes(folder / "dense", torch.float32, adapter=each) for each in (True, False))
    size = (folder / "dense" / "slorb" / "adapter_model.safetensors").stat().st_size
    assert 0.5 * size < with_it.total - without.total < size  # the file has a header


def test_slorb_of_a_checkpoint_of_a_run_is_in_its_weights(tmp_path: Path) -> None:
    model = sparse_model(slorb_k=8)
    folder = save_run_checkpoint(model, tmp_path / "checkpoint-3")
    with_it, without = (weight_bytes(folder, torch.float32, adapter=each) for each in (True, False))
    pairs = [layer.slorb for layer in sparse_layers(model).values()]
    assert with_it.total - without.total == sum(part.nbytes for pair in pairs for part in (pair.S, pair.X)) > 0


def test_an_image_encoder_is_not_read_for_a_token_of_text(tmp_path: Path) -> None:
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "model_type": "gemma3_text",
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8, "model_type": "siglip_vision_model",
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    found = weight_bytes(tmp_path, torch.float32)
    outside = [value for name, value in model.named_parameters() if "language_model" not in name]  # the head is tied
    assert found.read is not None and found.total - found.read == 4 * sum(value.numel() for value in outside) > 0


def test_with_experts_what_a_token_reads_is_unknown(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert weight_bytes(tmp_path, torch.float32).read is None


def test_compressed_exports_are_recognised_and_changed_files_noticed(exports: Path, tmp_path: Path) -> None:
    assert is_compressed(exports / "compressed") and not is_compressed(exports / "dense")
    folder = write_exports(tmp_path) / "dense"
    before = fingerprint(folder)
    assert before == fingerprint(folder) and set(before) == {"config.json", "model.safetensors"}
    (folder / "model.safetensors").write_bytes((exports / "dense" / "model.safetensors").read_bytes())
    assert fingerprint(folder) != before
