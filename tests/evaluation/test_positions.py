"""The longest sequence of a model: found for every family, and the code works at that length."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, Gemma3Config, TrainingArguments

from ast_sparse.cli.eval import main
from ast_sparse.cli.train import main as train
from ast_sparse.errors import UserError
from ast_sparse.evaluation.harness import Harness
from ast_sparse.evaluation.perplexity import default_seq_len, max_positions, perplexity
from ast_sparse.evaluation.samples import continue_prompts
from ast_sparse.training.start.blocks import block_length
from ast_sparse.training.trainer import SparseTrainer
from tests.evaluation.tasks import choice_task, perplexity_task
from tests.models import VOCAB, generated_text, tiny_model, tiny_tokenizer

ATTENTION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DECODER = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
BERT = {**ATTENTION, "max_position_embeddings": 48, "pad_token_id": 1, "is_decoder": True}
# Families whose code fails beyond its table of positions.
TABLES: dict[str, tuple[dict[str, Any], int]] = {
    "mpt": ({"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 48}, 48),
    "gpt2": ({"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48}, 48),
    "gpt_bigcode": ({"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48}, 48),
    "openai-gpt": ({"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48}, 48),
    "ctrl": ({"n_embd": 32, "n_layer": 1, "n_head": 2, "dff": 32, "n_positions": 48}, 48),
    "codegen": ({"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "n_positions": 48}, 48),
    "gptj": ({"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "n_positions": 48}, 48),
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 32, **ATTENTION, "max_position_embeddings": 48}, 48),
    "biogpt": ({**ATTENTION, "max_position_embeddings": 48}, 48),
    "bart": ({**DECODER, "max_position_embeddings": 48, "is_decoder": True}, 48),
    "whisper": ({**DECODER, "max_target_positions": 48, "pad_token_id": 1}, 48),
    "bert": (BERT, 48),
    "roberta": (BERT, 46),  # two rows belong to no position
    "xlm-roberta": (BERT, 46),
    "camembert": (BERT, 46),
    "data2vec-text": (BERT, 46),
    "roberta-prelayernorm": (BERT, 46),
}


def tiny(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=VOCAB, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("family", TABLES)
def test_the_limit_is_where_the_code_of_the_model_stops(family: str) -> None:
    settings, limit = TABLES[family]
    model = tiny(family, **settings)
    assert max_positions(model.config) == default_seq_len(model.config) == limit
    ids = torch.arange(3, 4 + limit)[None]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids[:, :limit], use_cache=False).logits).all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids, use_cache=False)
    with pytest.raises(UserError, match=f"window of {limit + 1} tokens .* longer than the model's {limit} positions"):
        perplexity(model, tiny_tokenizer(), generated_text(40), limit + 1)


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("mamba", {}, None),
        ("mamba2", {}, None),
        ("bloom", {}, None),
        ("xlnet", {}, None),
        ("falcon", {"alibi": True}, None),
        ("falcon", {}, 2048),
        ("mpt", {}, 2048),
        ("dbrx", {}, 2048),
        ("gpt_neo", {}, 2048),
        ("xglm", {}, 2048),
        ("musicgen_decoder", {}, 2048),
        ("llama", {"max_position_embeddings": 4096}, 4096),
        ("mistral", {"sliding_window": 512, "max_position_embeddings": 4096}, 4096),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 4096}, 16384),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4096}, 8192),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "max_position_embeddings": 32768}, 131072),
        (
            "deepseek_v3",
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
                "max_position_embeddings": 163840,
            },
            163840,
        ),
        (
            "llama",
            {
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                "max_position_embeddings": 131072,
            },
            131072,
        ),
    ],
)  # fmt: skip
def test_positions_of_configs(family: str, settings: dict[str, Any], limit: int | None) -> None:
    assert max_positions(CONFIG_MAPPING[family](**settings)) == limit


def test_rotary_scaling_does_not_change_the_published_window() -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    config = AutoConfig.for_model("llama", max_position_embeddings=4096, rope_scaling=scaling)
    assert default_seq_len(config) == 4096


@pytest.mark.parametrize("name", ["max_sequence_length", "max_seq_length", "seq_length", "n_ctx", "model_max_length"])
def test_names_of_configs_whose_code_comes_with_the_model(name: str) -> None:
    config = AutoConfig.for_model("bloom")
    setattr(config, name, 512)
    assert max_positions(config) == default_seq_len(config) == 512


def test_positions_inside_a_multimodal_config() -> None:
    text = {**ATTENTION, "max_position_embeddings": 96, "vocab_size": VOCAB}
    config = Gemma3Config(text_config=text)
    assert max_positions(config) == 96
    assert max_positions(CONFIG_MAPPING["musicgen"](text_encoder={"model_type": "t5"}, audio_encoder={
        "model_type": "encodec"}, decoder={"model_type": "musicgen_decoder"})) == 2048  # fmt: skip


def test_mpt_is_measured_at_its_window(tmp_path: Path) -> None:
    model = tiny("mpt", **TABLES["mpt"][0])
    for folder in ("a", "b"):
        model.save_pretrained(tmp_path / folder)
        tiny_tokenizer().save_pretrained(tmp_path / folder)
    (tmp_path / "text.txt").write_text(generated_text(30))
    choice_task(tmp_path, "choice")
    perplexity_task(tmp_path, "long", [generated_text(40)])
    text = ("--dataset", tmp_path / "text.txt")
    result = run(tmp_path / "a", tmp_path / "b", *text, "--tasks", "choice,long", "--include-path", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[2].split()[3] == "48"
    result = run(tmp_path / "a", *text, "--seq-len", "512")
    assert result.exit_code == 2
    assert "window of 512 tokens (`seq_len`) is longer than the model's 48 positions" in result.stderr
    assert continue_prompts(model, tiny_tokenizer(), ["the sparse"])["the sparse"]


def test_the_harness_gets_the_positions_of_every_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def likelihoods(self: HFLM, instances: list[Any], **_: Any) -> list[tuple[float, bool]]:
        lengths.append(self.max_length)
        return [(0.0, False) for _ in instances]

    monkeypatch.setattr(HFLM, "loglikelihood", likelihoods)
    harness = Harness([str(choice_task(tmp_path, "choice"))])
    for family in ("mpt", "gpt2", "roberta"):
        harness(tiny(family, **TABLES[family][0]), tiny_tokenizer())
    assert lengths == [48, 48, 46]


def test_blocks_of_a_run_fit_student_and_teacher(tmp_path: Path) -> None:
    tiny("mpt", **TABLES["mpt"][0]).save_pretrained(tmp_path / "mpt")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text(generated_text(30))
    for student, teacher, message in (
        ("mpt", None, f"data.block_size=64 is longer than the 48 positions of '{tmp_path / 'mpt'}'. Set it to 48 or"),
        ("gpt2", "mpt", f"data.block_size=64 is longer than the 48 positions of model.teacher='{tmp_path / 'mpt'}'."),
    ):
        config = {
            "model": {"name_or_path": str(tmp_path / student), "teacher": teacher and str(tmp_path / teacher)},
            "data": {"train": str(tmp_path / "text.txt"), "block_size": 64},
            "training": {"max_steps": 1, "output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none"},
        }
        (tmp_path / "run.yaml").write_text(json.dumps(config))
        result = CliRunner().invoke(train, ["--config", str(tmp_path / "run.yaml"), "--dry-run"])
        assert result.exit_code == 2 and message in result.stderr, result.output


def test_blocks_of_a_trainer_fit_student_and_teacher(tmp_path: Path) -> None:
    student, teacher = tiny_model("gpt2"), tiny("mpt", **TABLES["mpt"][0])
    assert [block_length(None, student), block_length(None, student, teacher), block_length(None, None)] == [
        128, 48, 1024,
    ]  # fmt: skip
    assert block_length(None, tiny("bloom", hidden_size=32, n_layer=1, n_head=2)) == 1024
    assert block_length(40, student, teacher) == 40
    with pytest.raises(UserError, match="block_size=64 is longer than the 48 positions of the model or its teacher"):
        SparseTrainer(
            model=teacher,
            args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True),
            train_dataset=Dataset.from_dict({"text": [generated_text(30)]}),
            processing_class=tiny_tokenizer(),
            block_size=64,
        )
