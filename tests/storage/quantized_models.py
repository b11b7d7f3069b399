"""Tiny model folders with quantized weights as they are published, and the weights that these encode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, PreTrainedConfig, Qwen3Config

from tests.models import VOCAB, tiny_tokenizer

SHAPE = dict(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
)  # fmt: skip
DEEPSEEK = dict(
    moe_intermediate_size=64, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, kv_lora_rank=32,
    q_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32, first_k_dense_replace=1,
)  # fmt: skip


def fp8_config(family: str) -> PreTrainedConfig:
    if family == "deepseek_v3":
        return DeepseekV3Config(**SHAPE, **DEEPSEEK)
    return Qwen3Config(**SHAPE, head_dim=32)


def save_fp8_model(
    folder: Path,
    family: str = "qwen3",
    block: tuple[int, int] | None = (128, 128),
    scale: str = "weight_scale_inv",
    change: Callable[[Tensor], Tensor] = lambda weight: weight,
    **settings: Any,
) -> dict[str, Tensor]:
    """Write a model whose `*_proj.weight` are FP8; return the weights of its files in float32, by stored name.

    Args:
        block: rows and columns of a scale; None for one scale per tensor.
        change: applied to the weights before they are encoded.
        settings: further keys of `quantization_config`.
    """
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(fp8_config(family), dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    file = folder / "model.safetensors"
    stored, meant = {}, {}
    for name, weight in load_file(file).items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight.bfloat16()
            meant[name] = stored[name].float()
            continue
        codes, scales, meant[name] = _encode(change(weight), block or tuple(weight.shape))
        stored[name] = codes
        stored[f"{name.removesuffix('weight')}{scale}"] = scales if block else scales.squeeze()
    save_file({name: value.contiguous() for name, value in stored.items()}, file, metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block, **settings}
    edit_config(folder, quantization_config=quantization, dtype="bfloat16")
    return meant


def _encode(weight: Tensor, block: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    codes, meant = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = codes[part].float() * scales[i, j]
    return codes, scales, meant


def edit_config(folder: Path, **values: Any) -> None:
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def plain_twin(folder: Path, family: str, meant: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a model saved with those weights, by transformers alone."""
    AutoModelForCausalLM.from_config(fp8_config(family), dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_file(
        {name: value.contiguous() for name, value in meant.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def save_mxfp4_model(folder: Path) -> dict[str, Tensor]:
    """Write a gpt-oss model whose experts are MXFP4, two codes per byte; return its decoded weights by name."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=16, num_local_experts=2, num_experts_per_tok=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = weight.bfloat16().contiguous()
            meant[name] = stored[name].float()
            continue
        experts, columns, rows = weight.shape
        codes = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
        pairs = torch.stack([values[(codes & 15).long()], values[(codes >> 4).long()]], -1).flatten(-2)
        meant[name] = (pairs * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2).contiguous()
        stored |= {f"{name}_blocks": codes, f"{name}_scales": scales}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config={"quant_method": "mxfp4"}, dtype="bfloat16")
    return meant
