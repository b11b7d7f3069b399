"""Exports and pruned models have the dtypes and values of the source as transformers loads it in that dtype."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ast_sparse.cli.export import main as export
from ast_sparse.cli.prune import main as prune
from ast_sparse.sparsity.masks import nm_mask
from tests.export.sparse_models import change_tensors
from tests.models import VOCAB, tiny_tokenizer

BASE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
MLA = dict(kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
MOE = dict(
    moe_intermediate_size=32, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
    first_k_dense_replace=1,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {  # kept in float32: under bfloat16 and float16, under float16, by the class
    "deepseek_v3": BASE | MLA | MOE,
    "glm4_moe": BASE | MOE | {"head_dim": 16},
    "ernie4_5_moe": BASE | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_intermediate_size": 32},
    "gpt_oss": BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "mamba": {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "eos_token_id": 0},
    "llama": BASE,
    "gemma3_text": BASE | {"head_dim": 16},
}
PRUNED = ("q_proj.weight", "o_proj.weight", "x_proj.weight", "down_proj.weight", "kv_b_proj.weight")


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32, is_sparse: bool = False) -> Path:
    """A model whose small tensors bfloat16 cannot represent exactly, like those of trained models."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dim() < 3 and "embed" not in name:
            value.add_(torch.randn_like(value) * 0.01 + (6.9 if "bias" in name else 0))
            if is_sparse and name.endswith(PRUNED):
                value.copy_(torch.where(nm_mask(value.abs(), 2, 4), value, 0))
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ast_prune_writes_each_tensor_as_it_is_loaded_in_that_dtype(family: str, dtype: str, tmp_path: Path) -> None:
    source, out = save(tmp_path / "source", family), tmp_path / "out"
    result = CliRunner().invoke(prune, [str(source), str(out), "--method", "magnitude", "--dtype", dtype])
    assert result.exit_code == 0, result.output
    wanted, found = loaded(source, getattr(torch, dtype)), loaded(out, getattr(torch, dtype))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        kept = (found[name] != 0) | (value == 0)
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name][kept], value[kept]), name
        if value.dim() < 2:
            assert torch.equal(found[name], value), name
    stored = load_file(out / "model.safetensors")
    assert all(stored[name].dtype == value.dtype for name, value in wanted.items() if name in stored)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", ["dense", "compressed"])
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "mamba", "llama"])
def test_ast_export_does_so_too(family: str, layout: str, dtype: str, tmp_path: Path) -> None:
    source, out = save(tmp_path / "source", family, is_sparse=True), tmp_path / "out"
    result = CliRunner().invoke(export, [str(source), str(out), "--format", layout, "--dtype", dtype])
    assert result.exit_code == 0, result.output
    wanted, found = loaded(source, getattr(torch, dtype)), loaded(out, getattr(torch, dtype))
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", ["dense", "compressed"])
def test_a_bfloat16_folder_with_some_float32_tensors_is_not_rounded_on_the_way(layout: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama", torch.bfloat16, is_sparse=True)
    name = "model.norm.weight"
    change_tensors(source, lambda tensors: tensors.update({name: torch.linspace(0.9, 1.1, 64)}))
    for dtype in ("float32", "float16"):
        arguments = [str(source), str(tmp_path / "out"), "--format", layout, "--dtype", dtype, "--overwrite"]
        assert CliRunner().invoke(export, arguments).exit_code == 0
        found = loaded(tmp_path / "out", getattr(torch, dtype))[name]
        assert torch.equal(found, torch.linspace(0.9, 1.1, 64).to(getattr(torch, dtype)))


@pytest.mark.parametrize("command", ["prune", "export"])
def test_configurations_inside_name_the_same_dtype(command: str, tmp_path: Path) -> None:
    text = BASE | {"head_dim": 16, "model_type": "gemma3_text"}
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8, "model_type": "siglip_vision_model",
    }  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    source, out = tmp_path / "source", tmp_path / "out"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, value in model.state_dict().items():
        if command == "export" and name.endswith("_proj.weight"):
            value.copy_(torch.where(nm_mask(value.abs(), 2, 4), value, 0))
    model.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    call = (prune, ["--method", "magnitude"]) if command == "prune" else (export, ["--format", "dense"])
    result = CliRunner().invoke(call[0], [str(source), str(out), *call[1]])
    assert result.exit_code == 0, result.output
    written = json.loads((out / "config.json").read_text())
    named = [each["dtype"] for each in (written, *written.values()) if isinstance(each, dict) and "dtype" in each]
    assert named and set(named) == {"bfloat16"}, written
