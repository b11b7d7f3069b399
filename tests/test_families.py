"""Every family: the trained model is what is written and read, and a step with learning rate 0 changes nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from ast_sparse import SparseTrainer, SparsityConfig
from ast_sparse.export.export import export_model
from ast_sparse.export.quantizer import AstSparse24Config, CompressedLinear
from ast_sparse.sparsity.model import sparse_layers, sparsify_model
from ast_sparse.storage.load import load_causal_lm
from tests.families import family_model
from tests.models import VOCAB

FAMILIES = (
    "apertus", "arcee", "bamba", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2", "dbrx",
    "deepseek_v2", "deepseek_v3", "deepseek_v4", "diffllama", "doge", "dots1", "ernie4_5", "exaone4", "falcon",
    "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4", "glm4_moe", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid",
    "hy_v4", "nemotron_h", "qwen3_5_moe_text", "qwen4_exp_text", "zaya",
    "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "jamba", "jetmoe", "lfm2", "llama", "llama4_text", "mamba",
    "mamba2", "minimax", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmoe", "openai-gpt", "opt",
    "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "recurrent_gemma",
    "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "xlstm", "zamba", "zamba2",
)  # fmt: skip
# by family, not by test: what a model of this structure reads directly is found once
each_family = pytest.mark.parametrize("family", FAMILIES, scope="module")
IDS = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return result


def same(found: Tensor, expected: Tensor, share: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


@each_family
def test_what_is_trained_is_what_is_written_and_read(tmp_path: Path, family: str) -> None:
    model = family_model(family)
    sparsify_model(model, SparsityConfig())
    for layer in sparse_layers(model).values():  # masks that the magnitudes would not give
        layer.mask.data.copy_(layer.mask.roll(2, dims=1 - layer.group_dim))
    expected = logits(model)
    dense, compressed = tmp_path / "dense", tmp_path / "compressed"
    export_model(model, dense, "dense", dtype="float32")
    exported = logits(load_causal_lm(dense))
    same(exported, expected)
    export_model(model, compressed, "compressed", dtype="float32")
    assert torch.equal(logits(load_causal_lm(compressed)), exported)
    own = AstSparse24Config(dequantize=False)
    packed = AutoModelForCausalLM.from_pretrained(compressed, quantization_config=own, dtype=torch.float32)
    assert any(isinstance(module, CompressedLinear) for module in packed.modules())
    same(logits(packed), expected, share=4e-6)  # its products add in another order


@each_family
def test_a_step_of_rate_0_leaves_the_model_as_it_was(tmp_path: Path, family: str) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, learning_rate=0.0, per_device_train_batch_size=2,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": row} for row in IDS.tolist()]
    config = SparsityConfig(mask_interval=1, mask_decay=0.0)
    run = SparseTrainer(family_model(family), args, sparsity_config=config, train_dataset=data)
    before = logits(run.model)
    run.train()
    same(logits(run.model), before)
    run.save_model()
    same(logits(load_causal_lm(tmp_path)), before)
