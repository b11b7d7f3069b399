"""Random models and token ids of the shapes that the checks train."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

_SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "LLaMA-1.1B": dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048,
    ),
    "LLaMA, 4 layers": dict(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=8, max_position_embeddings=2048,
    ),
    "tiny": dict(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    ),
}  # fmt: skip


def config_of(name: str) -> LlamaConfig:
    """The configuration of a shape; no token ends a text."""
    return LlamaConfig(**_SHAPES[name], bos_token_id=None, eos_token_id=None)


def new_model(name: str, device: torch.device | None = None, seed: int = 0) -> Any:
    """A causal LM with random float32 weights, made on the device, or on the CPU if none is given."""
    torch.manual_seed(seed)
    with torch.device(device or "cpu"):  # a CPU takes ten seconds for a billion random numbers
        model: Any = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    return model


def token_ids(name: str, rows: int, length: int) -> torch.Tensor:
    """Random ids `[rows, length]`, on the CPU."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, int(_SHAPES[name]["vocab_size"]), (rows, length), generator=generator)


def matrix_flops(name: str) -> int:
    """FLOP of the products of a forward pass with weights, a token; attention scores are left out."""
    shape = _SHAPES[name]
    width, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    keys = width // heads * shape["num_key_value_heads"]
    block = 2 * width * width + 2 * width * keys + 3 * width * inner
    return 2 * int(shape["num_hidden_layers"] * block + width * shape["vocab_size"])
