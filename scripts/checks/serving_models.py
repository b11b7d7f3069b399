"""Tiny random models for `scripts/checks/vllm.sh`, exported, and the tokens that transformers chooses for them.

python scripts/checks/serving_models.py WORK [EXPORTS]    # writes WORK/*/ and WORK/expected.json
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ast_sparse import SLoRBConfig, SparsityConfig, export_model, sparse_layers, sparsify_model
from ast_sparse.storage.files import read_json, write_json
from tests.models import VOCAB, tiny_tokenizer

PROMPTS = ((5, 6, 7, 8), (20, 3, 99, 41, 7), (100, 2), tuple(range(10, 90, 3)))  # token ids, for any vocabulary
TOKENS = 32
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 64}, "mistral": {"sliding_window": None, "head_dim": 64},
    "gemma": {"head_dim": 64}, "gemma2": {"head_dim": 64}, "gemma3_text": {"head_dim": 64},
    "opt": {"ffn_dim": 768, "word_embed_proj_dim": 256, "init_std": 0.1}, "phi3": {"pad_token_id": None},
    "granite": {}, "stablelm": {}, "cohere": {}, "olmo2": {}, "starcoder2": {}, "falcon": {}, "bloom": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 64},
}  # fmt: skip
_SIZES = dict(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, initializer_range=0.1,
)  # fmt: skip


def random_model(family: str, slorb_k: int | None = None, exclude: tuple[str, ...] = ()) -> PreTrainedModel:
    """A 2:4 model with random weights, large enough that its tokens differ from each other."""
    torch.manual_seed(0)
    sizes = _SIZES if family != "gpt2" else dict(vocab_size=VOCAB, n_embd=256, n_layer=2, n_head=4, eos_token_id=0)
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES.get(family, {})})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    slorb = None if slorb_k is None else SLoRBConfig(enabled=True, k=slorb_k)
    sparsify_model(model, SparsityConfig(pattern="2:4", exclude=exclude), slorb)
    for layer in sparse_layers(model).values():
        if layer.slorb is not None:
            torch.nn.init.normal_(layer.slorb.X, std=0.1)
            torch.nn.init.normal_(layer.slorb.S, std=0.1)
    return model


def exported(model: PreTrainedModel, folder: Path, format: str = "compressed", dtype: str = "float32") -> Path:
    """A model exported with the tiny tokenizer."""
    export_model(model, folder, format, dtype=dtype, tokenizer=tiny_tokenizer())
    return folder


def chosen_tokens(folder: Path, adapter: Path | None = None) -> list[list[int]]:
    """Greedy tokens of transformers, which decodes the weights, in float32; through PEFT if there is an adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.generation_config.eos_token_id = None  # it is a token as any other
    found = []
    for prompt in PROMPTS:
        ids = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS, pad_token_id=0)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def changed(source: Path, folder: Path, **keys: Any) -> Path:
    """A copy of an export with other keys in its `quantization_config`."""
    shutil.copytree(source, folder)
    config = read_json(folder / "config.json")
    config["quantization_config"] |= keys
    write_json(folder / "config.json", config)
    return folder


def main(work: Path, exports: Path | None) -> None:
    """Write every model, then the expected tokens by folder."""
    work.mkdir(parents=True, exist_ok=True)
    expected = {}
    with_slorb = random_model("llama", slorb_k=4)
    tiny = exported(with_slorb, work / "tiny")
    for name, format in (("compressed", "compressed"), ("dense", "dense")):
        exported(with_slorb, work / f"tiny-bf16-{name}", format, "bfloat16")
    expected["tiny"] = chosen_tokens(tiny)
    expected["tiny+slorb"] = chosen_tokens(tiny, tiny / "slorb")
    if exports is not None:
        expected["exports"] = chosen_tokens(exports / "compressed")
    for family in FAMILIES:
        expected[family] = chosen_tokens(exported(random_model(family), work / f"family-{family}"))
    exported(random_model("gpt2"), work / "gpt2")
    exported(random_model("mixtral"), work / "mixtral")
    exported(random_model("llama", exclude=("*.k_proj",)), work / "partly")
    names = read_json(tiny / "config.json")["quantization_config"]["modules"]
    changed(tiny, work / "newer", format_version=2)
    changed(tiny, work / "unbuilt", modules=[*names, "model.layers.7.mlp.up_proj"])
    file = changed(tiny, work / "damaged") / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (work / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
