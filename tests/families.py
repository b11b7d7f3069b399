"""A tiny model of every family that AutoModelForCausalLM builds from a configuration and that runs on text."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.models import VOCAB

# Settings of many families; each takes those that its configuration knows.
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, head_dim=8, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4, is_decoder=True,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_topk=2, n_group=1, topk_group=1,
    moe_intermediate_size=16, shared_expert_intermediate_size=32, first_k_dense_replace=1,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
    state_size=8, time_step_rank=8, expand=2, num_heads=4, n_groups=1,
    mamba_d_state=8, mamba_expand=2, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_num_heads=4,
    mamba_head_dim=16, mamba_dt_rank=8, chunk_size=8, mamba_chunk_size=8,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attention_dropout=0.0, hidden_dropout=0.0, dropout=0.0,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, activation_dropout=0.0, layerdrop=0.0,
    decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, d_model=32, ffn_dim=48,
)  # fmt: skip

_LATENT = {"head_dim": None, "num_key_value_heads": 4}  # attention with latent keys and values
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
# What else a family needs; None: its own default.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"head_dim": None, "n_ctx": 128},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": {"n_shared_experts": 1},
    "falcon": {"head_dim": None},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
                     "intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0],
                     "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
    "gemma4_text": {"head_dim": None, "global_head_dim": None},
    "glm4_moe_lite": _LATENT,
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "intermediate_size": 48},
    "gptj": {"head_dim": None},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "longcat_flash": _LATENT,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "minicpm3": _LATENT,
    "qwen3_5_text": _LINEAR_THEN_FULL,
    "qwen3_next": _LINEAR_THEN_FULL,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xlstm": {"v_head_dim": None, "embedding_dim": None},
    "youtu": _LATENT,
    "zamba": {
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4, "n_mamba_heads": 2,
        "attention_hidden_size": 64, "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 5,
        "num_mem_blocks": 2, "attention_hidden_size": 64, "attention_head_dim": 16, "head_dim": None,
        "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def family_config(family: str, **values: Any) -> PreTrainedConfig:
    """A tiny configuration of a family."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    wanted = {key: value for key, value in _SIZES.items() if hasattr(default, key)} | _OWN.get(family, {}) | values
    return kind(**{key: value for key, value in wanted.items() if value is not None})


def family_model(family: str, seed: int = 0, **values: Any) -> PreTrainedModel:
    """A tiny model of a family with random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(family_config(family, **values), dtype=torch.float32)
