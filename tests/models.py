"""Tiny random models of the families, a tokenizer trained on generated text, and that text."""

import random
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCAB = 128
FAMILIES = ("llama", "opt", "gpt2", "qwen2", "mistral")

_WORDS = ("the", "sparse", "model", "keeps", "two", "of", "four", "weights", "while", "dense", "masks", "move", "late")


def generated_text(sentences: int = 400, seed: int = 0) -> str:
    """Text with some structure: short sentences over a small vocabulary, one per line."""
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(_WORDS, k=rng.randint(4, 9))) + "." for _ in range(sentences))


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator([generated_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def tiny_config(family: str) -> PreTrainedConfig:
    llama = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    if family == "llama":
        return LlamaConfig(**llama, tie_word_embeddings=True)
    if family == "mistral":
        return MistralConfig(**llama, sliding_window=None)
    if family == "qwen2":
        return Qwen2Config(**llama)
    if family == "opt":
        return OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0, eos_token_id=0, bos_token_id=None,
        )  # fmt: skip
    if family == "gpt2":
        return GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, eos_token_id=0, bos_token_id=0,
        )  # fmt: skip
    raise KeyError(family)


def tiny_model(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)


def save_tiny_model(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """Write a model folder as users have it: weights, config and tokenizer."""
    tiny_model(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
