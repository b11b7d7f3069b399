"""A `.gguf` file loads as a plain model that can be saved."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ast_sparse.storage.load import load_causal_lm, random_causal_lm
from ast_sparse.storage.locate import load_model_config
from tests.export.sparse_models import token_ids
from tests.models import tiny_model

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotary weight in the order of llama.cpp."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    model = tiny_model("llama")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            array = interleave(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        for own, theirs in NAMES.items():
            name = name.replace(own, theirs)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_file_loads_as_a_plain_model_that_saves(gguf_file: Path, tmp_path: Path) -> None:
    expected = tiny_model("llama").eval()(token_ids()).logits
    for arguments in ({"name_or_path": gguf_file}, {"name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}):
        model = load_causal_lm(**arguments)
        torch.testing.assert_close(model(token_ids()).logits, expected)
        assert model.dtype == torch.float32 and not getattr(model, "hf_quantizer", None)
        assert not getattr(model.config, "quantization_config", None)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(load_causal_lm(tmp_path / "saved")(token_ids()).logits, model(token_ids()).logits)
    assert load_model_config(gguf_file).hidden_size == 32


def test_random_weights_need_the_configuration_of_a_gguf_file_alone(gguf_file: Path, tmp_path: Path) -> None:
    model = random_causal_lm(gguf_file, seed=3)
    torch.manual_seed(3)
    expected = AutoModelForCausalLM.from_config(model.config)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert model.config.hidden_size == 32 and model.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_causal_lm(tmp_path / "saved")(token_ids()).logits, model(token_ids()).logits)


def test_generation_settings_beside_a_gguf_file_are_read(gguf_file: Path) -> None:
    assert load_causal_lm(gguf_file).generation_config.top_k is None
    tiny_model("llama").config.save_pretrained(gguf_file.parent)
    (gguf_file.parent / "generation_config.json").write_text('{"do_sample": true, "top_k": 7}')
    assert load_causal_lm(gguf_file).generation_config.top_k == 7
    assert random_causal_lm(gguf_file, seed=0).generation_config.top_k == 7
