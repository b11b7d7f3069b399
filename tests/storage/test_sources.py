"""Folders that our tools read like any model (compressed ones saved again, remote code), and those they refuse."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    CpmAntConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MllamaConfig,
    PreTrainedConfig,
    T5Config,
    TrainingArguments,
    XLMConfig,
    XLNetConfig,
)

from ast_sparse import AstSparse24Config, SparseTrainer
from ast_sparse.cli.eval import main as evaluate
from ast_sparse.cli.export import main as export
from ast_sparse.cli.prune import main as prune
from ast_sparse.cli.train import main as train
from ast_sparse.config import DistillationConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import evaluate_blocks
from ast_sparse.export.export import export_model
from ast_sparse.sparsity.masks import nm_mask
from ast_sparse.sparsity.model import select_layers, sparsify_model
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.locate import load_model_config
from ast_sparse.training.callbacks.flops import teacher_parameters
from tests.export.sparse_models import change_tensors, sparse_model, token_ids
from tests.models import generated_text, save_tiny_model, tiny_model, tiny_tokenizer
from tests.storage.quantized_models import plain_twin, save_fp8_model

RUN = """
model: {{name_or_path: {model}{more}}}
data: {{train: {text}, block_size: 32, eval_share: 0}}
evaluation: {{datasets: [], report: false}}
training: {{max_steps: 2, per_device_train_batch_size: 2, learning_rate: 0.0, report_to: none, use_cpu: true}}
"""


def call(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def run_training(folder: Path, model: Path, more: str = "", *options: str) -> Result:
    (folder / "text.txt").write_text(generated_text())
    (folder / "run.yaml").write_text(RUN.format(model=model, text=folder / "text.txt", more=more))
    return call(train, "--config", folder / "run.yaml", "--output-dir", folder / "trained", "--overwrite", *options)


def run_evaluation(folder: Path, model: Path, *options: str) -> Result:
    (folder / "text.txt").write_text(generated_text())
    return call(evaluate, model, "--dataset", folder / "text.txt", "--seq-len", 32, *options)


# ---- a compressed export, saved again from a model that keeps it compressed -----------------------------------------


@pytest.fixture(params=["llama", "gpt2", "deepseek_v3"])
def saved_again(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The folder, and the state dict of the model."""
    if request.param == "deepseek_v3":
        meant = save_fp8_model(tmp_path / "fp8", "deepseek_v3")
        for name, weight in meant.items():
            if "_proj" in name:
                weight.copy_(torch.where(nm_mask(weight.abs(), 2, 4), weight, 0))
        source: Any = tmp_path / "plain"
        plain_twin(source, "deepseek_v3", meant)
    else:
        source = sparse_model(request.param)
    export_model(source, tmp_path / "export", dtype="float32", tokenizer=tiny_tokenizer())
    config = AstSparse24Config(dequantize=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", quantization_config=config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    tiny_tokenizer().save_pretrained(tmp_path / "again")
    return tmp_path / "again", load_causal_lm(tmp_path / "export").state_dict()


def test_a_compressed_folder_saved_again_is_decoded_by_every_tool(
    saved_again: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, wanted = saved_again
    found = load_causal_lm(folder).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    for layout, dtype in (("dense", "float32"), ("compressed", "bfloat16"), ("compressed", "float32")):
        result = call(export, folder, tmp_path / "out", "--format", layout, "--dtype", dtype, "--overwrite")
        assert result.exit_code == 0, result.output
        state = load_causal_lm(tmp_path / "out").state_dict()
        rounded = {name: wanted[name].to(getattr(torch, dtype)).to(state[name].dtype) for name in wanted}
        assert all(torch.equal(state[name], value) for name, value in rounded.items() if "bias" not in name)
    result = call(prune, folder, tmp_path / "out", "--method", "magnitude", "--dtype", "float32", "--overwrite")
    assert result.exit_code == 0, result.output
    state = load_causal_lm(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())  # it is 2:4 already
    result = run_training(tmp_path, folder)
    assert result.exit_code == 0, result.output
    result = run_evaluation(tmp_path, folder)
    assert result.exit_code == 0, result.output
    trainer = SparseTrainer(str(folder), TrainingArguments(str(tmp_path / "t"), report_to="none", use_cpu=True))
    assert len(trainer.sparsity_report.pruned) == len(select_layers(load_causal_lm(folder))[0])


def test_compressed_layers_of_a_model_object_are_decoded_before_they_are_pruned(
    saved_again: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, wanted = saved_again
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = model(token_ids()).logits
    assert getattr(model, "hf_quantizer", None) is not None
    with pytest.raises(UserError, match="Cannot export"):
        export_model(model, tmp_path / "out")
    sparsify_model(model, SparsityConfig())
    assert torch.allclose(model(token_ids()).logits, before, atol=1e-6)
    assert all(each.requires_grad for each in model.parameters() if each.is_floating_point())
    model.save_pretrained(tmp_path / "raw", save_original_format=False)
    state = load_file(tmp_path / "raw" / "model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in wanted.items() if name in state)


# ---- remote code -----------------------------------------------------------------------------------------------------

_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
_AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    from tests.storage.quantized_models import edit_config

    folder = save_tiny_model(tmp_path / "remote")
    edit_config(folder, model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=_AUTO_MAP)
    (folder / "modeling_own.py").write_text(_CODE)
    return folder


def test_every_tool_reads_and_writes_a_model_with_code_of_its_own(remote: Path, tmp_path: Path) -> None:
    trust = "--trust-remote-code"
    for command, arguments in (
        (prune, [remote, tmp_path / "no", "--method", "magnitude"]),
        (export, [remote, tmp_path / "no"]),
        (export, [remote, "--table"]),
    ):
        result = call(command, *arguments)
        assert result.exit_code == 2 and "trust" in result.output, result.output
    result = call(prune, remote, tmp_path / "pruned", "--method", "magnitude", "--dtype", "float32", trust)
    assert result.exit_code == 0, result.output
    wanted = load_causal_lm(tmp_path / "pruned", trust_remote_code=True)
    assert type(wanted).__name__ == "OwnForCausalLM" and (tmp_path / "pruned" / "modeling_own.py").is_file()
    for layout in ("dense", "compressed"):
        out = tmp_path / layout
        result = call(export, tmp_path / "pruned", out, "--format", layout, "--dtype", "float32", trust)
        assert result.exit_code == 0, result.output
        found = load_causal_lm(out, trust_remote_code=True)
        assert type(found).__name__ == "OwnForCausalLM"
        assert torch.equal(found(token_ids()).logits, wanted(token_ids()).logits)
        result = run_evaluation(tmp_path, out, trust)
        assert result.exit_code == 0, result.output
    assert call(export, tmp_path / "pruned", "--table", trust).exit_code == 0
    result = run_training(tmp_path, remote, ", trust_remote_code: true", "--set", "training.save_steps=1")
    assert result.exit_code == 0, result.output
    assert type(load_causal_lm(tmp_path / "trained", trust_remote_code=True)).__name__ == "OwnForCausalLM"
    result = call(export, tmp_path / "trained" / "checkpoint-1", tmp_path / "from-checkpoint", trust)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        ("def forward(self, input_ids, attention_mask=None): return super().forward(input_ids, attention_mask)", None),
        ("def forward(self, **kw): return super().forward(**kw).to_tuple()", "OwnForCausalLM returns a tuple, which"),
    ],
)
def test_code_may_know_no_cache_but_returns_logits(
    remote: Path, forward: str, reason: str | None, tmp_path: Path
) -> None:
    (remote / "modeling_own.py").write_text(f"{_CODE}    {forward}\n")
    for result in (
        run_training(tmp_path, remote, ", trust_remote_code: true"),
        run_evaluation(tmp_path, remote, "--trust-remote-code"),
    ):
        assert result.exit_code == (0 if reason is None else 2) and (reason or "") in result.output, result.output


def test_a_model_that_is_set_to_return_tuples_is_refused(tmp_path: Path) -> None:
    from tests.storage.quantized_models import edit_config

    folder = save_tiny_model(tmp_path / "model")
    edit_config(folder, return_dict=False)
    result = run_training(tmp_path, folder)
    assert result.exit_code == 2 and "return_dict=False in its configuration" in result.output, result.output
    result = run_evaluation(tmp_path, folder)
    assert result.exit_code == 2 and "return_dict=False in its configuration" in result.output, result.output


def test_a_teacher_with_code_of_its_own_is_allowed_by_the_same_setting(remote: Path, tmp_path: Path) -> None:
    student = save_tiny_model(tmp_path / "student")
    result = run_training(tmp_path, student, f", teacher: {remote}")
    assert result.exit_code == 2 and "allow it: --trust-remote-code" in result.output
    result = run_training(tmp_path, student, f", teacher: {remote}, trust_remote_code: true")
    assert result.exit_code == 0, result.output
    args = TrainingArguments(str(tmp_path / "t"), report_to="none", use_cpu=True)
    trainer = SparseTrainer(str(remote), args, trust_remote_code=True)
    assert type(trainer.model).__name__ == "OwnForCausalLM"


# ---- weights that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
)
def test_a_weight_that_is_not_finite_is_refused_by_name(name: str, value: float, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    change_tensors(folder, spoil)
    (tmp_path / "text.txt").write_text(generated_text())
    results = {
        "magnitude": call(prune, folder, tmp_path / "out", "--method", "magnitude"),
        "wanda": call(
            prune, folder, tmp_path / "out", "--method", "wanda", "--calibration", tmp_path / "text.txt",
            "--samples", 2, "--seq-len", 16,
        ),
        "export": call(export, folder, tmp_path / "out"),
        "table": call(export, folder, "--table"),
        "eval": run_evaluation(tmp_path, folder),
        "train": run_training(tmp_path, folder),
    }  # fmt: skip
    for key, result in results.items():
        assert result.exit_code == 2 and f"`{name}`" in result.output and "not finite" in result.output, (key, result)
    assert not (tmp_path / "out").exists()
    args = TrainingArguments(str(tmp_path / "t"), report_to="none", use_cpu=True)
    for model in (str(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)):
        with pytest.raises(UserError, match=rf"`{name}`.*not finite"):
            SparseTrainer(model, args)
    with pytest.raises(UserError, match=rf"`{name}`.*not finite"):
        sparsify_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), SparsityConfig())


def test_a_buffer_that_decides_which_expert_is_asked_is_looked_at_too(tmp_path: Path) -> None:
    plain_twin(tmp_path, "deepseek_v3", save_fp8_model(tmp_path, "deepseek_v3"))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.full((4,), math.nan)}))
    with pytest.raises(UserError, match=f"`{name}`.*not finite"):
        load_causal_lm(tmp_path)


# ---- a dense model with a layer of zeros ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_of_zeros_does_not_make_a_dense_model_sparse(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", family)
    part = "mlp.c_proj.weight" if family == "gpt2" else "mlp.down_proj.weight"

    def clear(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(part):
                tensors[name].zero_()

    change_tensors(folder, clear)
    for layout in ("dense", "compressed"):
        result = call(export, folder, tmp_path / "out", "--format", layout)
        assert result.exit_code == 2 and "The model is not 2:4: in `" in result.output, result.output
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="The model is not 2:4"):
        export_model(load_causal_lm(folder), tmp_path / "out")
    assert "The model is dense" in call(export, folder, "--table").output
    result = call(export, folder, "--table", "--pattern", "2:4")
    assert result.exit_code == 2 and "is not 2:4" in result.output


def test_a_sparse_model_may_have_a_layer_of_zeros(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros_like(tensors[name])}))
    assert call(prune, folder, tmp_path / "pruned", "--method", "magnitude").exit_code == 0
    result = call(export, tmp_path / "pruned", tmp_path / "out")
    assert result.exit_code == 0 and "pruned (2:4)" in result.output


# ---- models that predict no next token, or cannot be loaded again ----------------------------------------------------


def save_config(folder: Path, config: PreTrainedConfig) -> Path:
    """A model folder whose weights are never read."""
    save_tiny_model(folder)
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "is a T5Config, which AutoModelForCausalLM does not load. Use a decoder-only"),
        (BartConfig(), "is a BartConfig, an encoder-decoder. Use a decoder-only"),
        (BertConfig(), "is a BertConfig that attends in both directions.* or set `is_decoder` to True"),
        (XLMConfig(), "is a XLMConfig that attends in both directions.* or set `causal` to True"),
        (XLNetConfig(), "is a XLNetConfig that attends in both directions.* or set `attn_type` to 'uni'"),
        (CpmAntConfig(), "is a CpmAntConfig that attends in both directions.* language model\\."),
        (LlamaConfig(is_causal=False), "is a LlamaConfig that attends .* or set `is_causal` to True"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "or set `use_bidirectional_attention` to False"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else "",
)
def test_a_model_of_another_kind_is_refused_by_its_kind(config: PreTrainedConfig, reason: str, tmp_path: Path) -> None:
    folder = save_config(tmp_path / "other", config)
    with pytest.raises(UserError, match=reason):
        load_causal_lm(folder)
    with pytest.raises(UserError, match=f"model.teacher='{folder}': .*{reason}"):
        teacher_parameters(str(folder))


def test_a_masked_lm_that_is_set_to_be_a_decoder_is_read(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=64)
    folder = save_config(tmp_path / "bert", config)
    assert load_model_config(folder, config_overrides={"is_decoder": True}).is_decoder
    args = TrainingArguments(str(tmp_path / "t"), report_to="none", use_cpu=True)
    bert, reason = AutoModelForCausalLM.from_config(config), "is a BertConfig that attends in both directions"
    for refused in (
        lambda: SparseTrainer(bert, args),
        lambda: SparseTrainer(tiny_model("llama"), args, distillation_config=DistillationConfig(), teacher_model=bert),
        lambda: evaluate_blocks(bert, [{"input_ids": [1, 2, 3, 4]}], progress=False),
    ):
        with pytest.raises(UserError, match=reason):
            refused()


def test_a_subclass_of_a_known_configuration_is_exported(tmp_path: Path) -> None:
    class OwnConfig(LlamaConfig):
        pass

    model = LlamaForCausalLM(OwnConfig(**tiny_model("llama").config.to_dict()))
    sparsify_model(model, SparsityConfig())
    export_model(model, tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out").config) is LlamaConfig


def test_a_text_model_that_could_not_be_loaded_again_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    sizes: Any = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=128, pad_token_id=0)
    config = MllamaConfig(
        text_config=dict(sizes, num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=[]),
        vision_config=dict(hidden_size=32, num_hidden_layers=1, num_global_layers=1, attention_heads=4),
    )  # fmt: skip
    folder = tmp_path / "mllama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_config(folder, config)
    reason = "loads the text model alone, a MllamaForCausalLM, and would not load it again once it is saved"
    result = run_training(tmp_path, folder)
    assert result.exit_code == 2 and reason in result.output and not (tmp_path / "trained").exists()
    result = call(prune, folder, tmp_path / "out", "--method", "magnitude")
    assert result.exit_code == 2 and reason in result.output
