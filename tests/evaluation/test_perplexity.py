"""Perplexity against a plain loop in float64, and the text it is reported on."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig, Gemma2Config, PreTrainedModel

from ast_sparse.errors import UserError
from ast_sparse.evaluation import scoring
from ast_sparse.evaluation.perplexity import (
    default_seq_len,
    evaluate_blocks,
    evaluate_text,
    perplexity,
    wikitext2_rows,
)
from tests.distillation.heads import SMALL, changed
from tests.models import FAMILIES, VOCAB, generated_text, tiny_model, tiny_tokenizer


def twin(model: PreTrainedModel, tokens: list[int], seq_len: int, windows: int | None = None) -> float:
    """Mean of -log p in float64, token by token."""
    model = model.double().eval()
    losses = []
    for start in list(range(0, len(tokens) - seq_len + 1, seq_len))[:windows]:
        window = tokens[start : start + seq_len]
        with torch.no_grad():
            probabilities = model(torch.tensor([window])).logits[0].softmax(-1)
        losses += [-math.log(probabilities[i, window[i + 1]]) for i in range(seq_len - 1)]
    return math.exp(sum(losses) / len(losses))


def tokens_of(text: str) -> list[int]:
    return tiny_tokenizer().encode(text, add_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_equals_a_plain_float64_loop(family: str) -> None:
    text = generated_text(60)
    expected = twin(tiny_model(family), tokens_of(text), 48)
    assert perplexity(tiny_model(family), tiny_tokenizer(), text, 48) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 47, 1000])
def test_chunks_of_positions_do_not_change_the_perplexity(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    text = generated_text(20)
    monkeypatch.setattr(scoring, "_POSITIONS_PER_CHUNK", chunk)
    expected = twin(tiny_model(), tokens_of(text), 48)
    assert perplexity(tiny_model(), tiny_tokenizer(), text, 48) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "unknown"])
def test_heads_that_cap_scale_or_do_something_else_have_the_same_perplexity(name: str) -> None:
    def model() -> PreTrainedModel:
        torch.manual_seed(0)
        if name == "unknown":
            return changed(factor=torch.linspace(1, 2, VOCAB))
        config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5) if name == "gemma2" else None
        return AutoModelForCausalLM.from_config(config or CohereConfig(**SMALL, logit_scale=4.0))

    text = generated_text(20)
    expected = twin(model(), tokens_of(text), 48)
    assert perplexity(model(), tiny_tokenizer(), text, 48) == pytest.approx(expected, rel=1e-5)


def test_a_known_head_makes_logits_of_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model(), []
    linear = torch.nn.functional.linear

    def watched(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows.append(input.shape[-2] if len(weight) == VOCAB else 0)
        return linear(input, weight, bias)

    monkeypatch.setattr(scoring, "_POSITIONS_PER_CHUNK", 7)
    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    perplexity(model, tiny_tokenizer(), generated_text(20), 48)
    assert max(rows) == 7


def test_rows_are_joined_by_a_blank_line() -> None:
    rows = [generated_text(9, 1) + "\n", "", generated_text(9, 2)]
    expected = twin(tiny_model(), tokens_of(f"{rows[0]}\n\n\n\n{rows[2]}"), 32)
    assert perplexity(tiny_model(), tiny_tokenizer(), rows, 32) == pytest.approx(expected, rel=1e-5)


def test_result_tells_what_was_measured() -> None:
    text = generated_text(60)
    result = evaluate_text(tiny_model(), tiny_tokenizer(), text, 48, 3, progress=False)
    assert (result.seq_len, result.windows, result.predicted_tokens) == (48, 3, 3 * 47)
    assert result.total_tokens == len(tokens_of(text))
    assert result.perplexity == pytest.approx(math.exp(result.mean_nll))
    assert result.perplexity == pytest.approx(twin(tiny_model(), tokens_of(text), 48, 3), rel=1e-5)
    assert result.seconds > 0


def test_more_windows_than_there_are_means_all() -> None:
    text = generated_text(20)
    results = [evaluate_text(tiny_model(), tiny_tokenizer(), text, 48, windows) for windows in (None, 10_000)]
    assert results[0].perplexity == results[1].perplexity and results[0].windows == len(tokens_of(text)) // 48


def test_tokenised_blocks_have_the_perplexity_of_their_text() -> None:
    tokens = tokens_of(generated_text(40))
    blocks = [tokens[i : i + 32] for i in range(0, len(tokens) - 31, 32)]
    expected = evaluate_text(tiny_model(), tiny_tokenizer(), generated_text(40), 32)
    data = Dataset.from_dict({"input_ids": blocks})
    for form in (blocks, data, data.with_format("torch"), torch.tensor(blocks)):
        result = evaluate_blocks(tiny_model(), form)
        assert (result.perplexity, result.windows) == (expected.perplexity, expected.windows)
    first = evaluate_blocks(tiny_model(), data, 2)
    assert (first.windows, first.total_tokens) == (2, len(blocks) * 32)


def test_mode_of_every_module_is_restored_even_after_an_error() -> None:
    model = tiny_model().train()
    model.get_output_embeddings().eval()
    modes = [part.training for part in model.modules()]
    perplexity(model, tiny_tokenizer(), generated_text(20), 48)
    assert [part.training for part in model.modules()] == modes
    with pytest.raises(IndexError):
        evaluate_blocks(model, [[1, 10_000]])
    assert [part.training for part in model.modules()] == modes


def test_dropout_is_off_and_no_gradient_is_kept() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.drop.p = 0.5
    found = [perplexity(model, tiny_tokenizer(), generated_text(20), 48) for _ in range(2)]
    assert found[0] == found[1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_loss_of_a_bfloat16_model_is_taken_in_float32() -> None:
    text = generated_text(40)
    model = tiny_model().bfloat16()
    expected = evaluate_text(model, tiny_tokenizer(), text, 48).mean_nll
    tokens = torch.tensor(tokens_of(text))
    losses = []
    for window in tokens[: len(tokens) // 48 * 48].view(-1, 48):
        logits = model(window[None]).logits[0, :-1].detach()
        assert logits.dtype == torch.bfloat16
        losses.append(torch.nn.functional.cross_entropy(logits.double(), window[1:]))
    assert expected == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)


def test_hopeless_models_get_inf_and_nan_instead_of_an_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    assert perplexity(model, tiny_tokenizer(), generated_text(20), 48) == math.inf
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    assert math.isnan(perplexity(model, tiny_tokenizer(), generated_text(20), 48))


def test_no_warning_about_the_length_of_the_text(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    length, tokenizer.model_max_length = tokenizer.model_max_length, 8
    try:
        perplexity(tiny_model(), tokenizer, generated_text(20), 48, 1)
    finally:
        tokenizer.model_max_length = length
    assert not tokenizer.deprecation_warnings


def test_what_cannot_be_measured_is_refused() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(UserError, match=r"text has \d tokens, fewer than one window of 48"):
        perplexity(model, tokenizer, "two of four", 48)
    with pytest.raises(UserError, match=r"window of 129 tokens \(`seq_len`\) is longer than the model's 128 positions"):
        perplexity(model, tokenizer, generated_text(), 129)
    with pytest.raises(UserError, match="must be at least 2"):
        perplexity(model, tokenizer, generated_text(), 1)
    with pytest.raises(UserError, match="number of windows must be at least 1, not 0"):
        perplexity(model, tokenizer, generated_text(), 48, 0)
    with pytest.raises(UserError, match="no held-out blocks"):
        evaluate_blocks(model, [])
    with pytest.raises(UserError, match="Block 1 has 2 tokens, block 0 has 3"):
        evaluate_blocks(model, [[1, 2, 3], [1, 2]])


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("gpt2", {}, 1024),
        ("gpt2", {"n_positions": 128}, 128),
        ("opt", {}, 2048),
        ("llama", {"max_position_embeddings": 4096}, 4096),  # LLaMA2
        ("llama", {"max_position_embeddings": 2048}, 2048),  # LLaMA
        ("llama", {"max_position_embeddings": 8192}, 2048),  # SmolLM2, LLaMA3
        ("llama", {"max_position_embeddings": 512}, 512),
        ("mistral", {"max_position_embeddings": 32768}, 2048),
        ("qwen2", {"max_position_embeddings": 4096}, 2048),
        ("bloom", {}, 2048),  # names no positions
    ],
)
def test_default_window_is_the_published_one(family: str, settings: dict, window: int) -> None:
    assert default_seq_len(AutoConfig.for_model(family, **settings)) == window


def test_rows_of_the_raw_file_are_those_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_bytes(" \n = Títle = \n \n One \u2028 row . \n Last".encode())
    expected = ["", " = Títle = \n", "", " One \u2028 row . \n", " Last"]
    assert wikitext2_rows(data_dir=tmp_path) == expected
    assert wikitext2_rows(data_dir=str(tmp_path / "wiki.test.raw")) == expected
    (tmp_path / "wiki.valid.raw").write_text("Another row\n")
    assert wikitext2_rows("validation", tmp_path) == ["Another row\n"]


def test_missing_wikitext_is_named(tmp_path: Path) -> None:
    for path, split, message in (
        (tmp_path, "test", "No wiki.test.raw in `--data-dir` "),
        (tmp_path, "validation", "No wiki.valid.raw in "),
        (tmp_path / "absent", "test", "No wiki.test.raw in "),
        (tmp_path, "train", "test or validation split, not `train`"),
        (None, "test", "cannot be loaded from the hub .* set `--data-dir` to a folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            wikitext2_rows(split, path)
        assert "\n" not in str(caught.value)
    (tmp_path / "wiki.test.raw").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        wikitext2_rows(data_dir=tmp_path)
    (tmp_path / "wiki.test.raw").write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        wikitext2_rows(data_dir=tmp_path)
