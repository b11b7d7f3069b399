"""Every result for a text against a plain loop over all logits in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ast_sparse.errors import UserError
from ast_sparse.evaluation import scoring
from ast_sparse.evaluation.measure import TextResult, check_tokens, measure_text, measure_texts, total_of
from ast_sparse.evaluation.perplexity import evaluate_text
from ast_sparse.evaluation.texts import Text
from tests.models import generated_text, tiny_config, tiny_model, tiny_tokenizer

DOCUMENTS = [generated_text(count, seed) for seed, count in enumerate((9, 1, 5, 20, 2))]


def tokens_of(text: str) -> list[int]:
    return tiny_tokenizer().encode(text, add_special_tokens=False)


def log_probabilities(model: PreTrainedModel, window: list[int]) -> Tensor:
    with torch.no_grad():
        return model.double().eval()(torch.tensor([window])).logits[0].log_softmax(-1)


def measured(model: PreTrainedModel, *arguments: Any, **options: Any) -> TextResult:
    return measure_text(model, tiny_tokenizer(), *arguments, progress=False, **options)


def student_and_teacher() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models that agree on some tokens."""
    student, teacher = tiny_model("qwen2"), tiny_model("qwen2")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.005)
    return student, teacher


def twin(
    windows: list[tuple[list[int], int]], model: PreTrainedModel | None = None, teacher: PreTrainedModel | None = None
) -> dict[str, float]:
    """Results of windows whose tokens from an index on are scored, token by token in float64."""
    model = model or tiny_model()
    losses, divergences, agreed, text = [], [], 0, ""
    for window, first in windows:
        log_s = log_probabilities(model, window)
        log_t = log_probabilities(teacher, window) if teacher is not None else log_s
        for at in range(first, len(window)):
            losses.append(-float(log_s[at - 1, window[at]]))
            divergences.append(float((log_t[at - 1].exp() * (log_t[at - 1] - log_s[at - 1])).sum()))
            agreed += int(log_t[at - 1].argmax() == log_s[at - 1].argmax())
        text += tiny_tokenizer().decode(window[first:], skip_special_tokens=True)
    return {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "bits_per_byte": sum(losses) / math.log(2) / len(text.encode()),
        "teacher_kl": sum(divergences) / len(divergences),
        "teacher_agreement": agreed / len(losses),
        "predicted_tokens": len(losses),
    }


def check(result: TextResult, expected: dict[str, float], *names: str) -> None:
    for name in ("perplexity", "bits_per_byte", "predicted_tokens", *names):
        rounding = 3e-8 if name == "teacher_kl" else None  # a small difference of float32 logarithms
        assert getattr(result, name) == pytest.approx(expected[name], rel=1e-5, abs=rounding), name


def apart(tokens: list[int], seq_len: int) -> list[tuple[list[int], int]]:
    return [(tokens[at : at + seq_len], 1) for at in range(0, len(tokens) - seq_len + 1, seq_len)]


def test_default_is_the_published_protocol() -> None:
    result = measured(tiny_model(), DOCUMENTS, 32)
    check(result, twin(apart(tokens_of("\n\n".join(DOCUMENTS)), 32)))
    plain = evaluate_text(tiny_model(), tiny_tokenizer(), DOCUMENTS, 32, progress=False)
    for name in ("perplexity", "mean_nll", "seq_len", "windows", "predicted_tokens", "total_tokens"):
        assert getattr(result, name) == getattr(plain, name)
    assert (result.teacher_kl, result.teacher_agreement, result.stride) == (None, None, None)
    assert (result.documents, result.join, result.all_windows) == (len(DOCUMENTS), "blank-line", result.windows)


@pytest.mark.parametrize("stride", [1, 7, 16, 31])
def test_stride_equals_a_plain_loop(stride: int) -> None:
    tokens = tokens_of("\n\n".join(DOCUMENTS[2:4]))
    windows, done = [], 1
    for begin in range(0, len(tokens), stride):
        end = min(begin + 32, len(tokens))
        windows.append((tokens[begin:end], done - begin))
        done = end
        if end == len(tokens):
            break
    result = measured(tiny_model(), DOCUMENTS[2:4], 32, stride=stride)
    check(result, twin(windows))
    assert result.predicted_tokens == len(tokens) - 1


def test_bits_per_byte_of_a_covered_text_are_over_all_bytes_but_the_first_tokens() -> None:
    text = "\n\n".join(DOCUMENTS)
    result = measured(tiny_model(), [text], 32, stride=16)
    first = tiny_tokenizer().decode(tokens_of(text)[:1])
    assert result.scored_bytes == len(text.encode()) - len(first.encode())
    expected = result.mean_nll * result.predicted_tokens / math.log(2) / result.scored_bytes
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("join", ["newline", "space", "none", "eos"])
def test_joins_equal_a_plain_loop(join: str) -> None:
    eos = tiny_tokenizer().eos_token
    text = {"newline": "\n", "space": " ", "none": "", "eos": eos}[join].join(DOCUMENTS)
    check(measured(tiny_model(), DOCUMENTS, 32, join=join), twin(apart(tokens_of(text), 32)))


@pytest.mark.parametrize("stride", [None, 20])
def test_no_window_crosses_separate_documents(stride: int | None) -> None:
    windows = []
    for tokens in map(tokens_of, DOCUMENTS):
        done = 1
        for begin in range(0, len(tokens), stride or 32):
            end = min(begin + 32, len(tokens))
            first = done - begin if stride else 1
            if end > done and end - begin > first:
                windows.append((tokens[begin:end], first))
            done = end
    result = measured(tiny_model(), DOCUMENTS, 32, join="separate", stride=stride)
    check(result, twin(windows))
    assert result.windows == len(windows) > len(DOCUMENTS)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_divergence_and_agreement_equal_a_plain_loop(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(scoring, "_POSITIONS_PER_CHUNK", chunk)
    student, teacher = student_and_teacher()
    result = measured(student, DOCUMENTS, 32, 6, teacher=teacher, stride=20)
    tokens = tokens_of("\n\n".join(DOCUMENTS))
    windows = [(tokens[at : at + 32], 12 if at else 1) for at in range(0, 6 * 20, 20)]
    without = measured(student, DOCUMENTS, 32, 6, stride=20)
    assert without.perplexity == result.perplexity  # the teacher changes nothing else
    check(result, twin(windows, student, teacher), "teacher_kl", "teacher_agreement")
    assert result.teacher_kl and result.teacher_kl > 1e-4 and 0.05 < (result.teacher_agreement or 0) < 0.95


def test_a_model_is_its_own_perfect_teacher() -> None:
    result = measured(tiny_model(), DOCUMENTS, 32, teacher=tiny_model())
    assert (result.teacher_kl, result.teacher_agreement) == (0.0, 1.0)


def test_tokens_the_teacher_rules_out_do_not_spoil_the_divergence() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    kl, agreed = scoring._compare(torch.tensor([[1.0, 0.5, 0.0]]), logits)
    p = torch.tensor([0.0, 1.0], dtype=torch.float64).softmax(-1)
    log_s = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64).log_softmax(-1)[:2]
    assert float(kl) == pytest.approx(float((p * (p.log() - log_s)).sum()), rel=1e-6) and int(agreed) == 0


def test_total_of_groups_is_over_all_their_tokens() -> None:
    texts = [
        Text(name=f"a.jsonl {index}", documents=documents, join="separate", group="a.jsonl")
        for index, documents in enumerate((DOCUMENTS[:2], DOCUMENTS[2:]))
    ]
    teacher = tiny_model(seed=1)
    rows = dict(measure_texts(tiny_model(), tiny_tokenizer(), texts, 32, teacher=teacher, progress=False))
    assert list(rows) == ["a.jsonl 0", "a.jsonl 1", "a.jsonl, all"]
    together = measured(tiny_model(), DOCUMENTS, 32, join="separate", teacher=teacher)
    for name in (
        "perplexity",
        "bits_per_byte",
        "teacher_kl",
        "teacher_agreement",
        "scored_bytes",
        "windows",
        "documents",
    ):
        assert getattr(rows["a.jsonl, all"], name) == pytest.approx(getattr(together, name), rel=1e-9), name
    assert rows["a.jsonl 0"].perplexity != rows["a.jsonl 1"].perplexity
    assert total_of([together]).perplexity == pytest.approx(together.perplexity)


def test_limits_of_text_and_caller_are_both_kept() -> None:
    texts = [Text(name="a", documents=DOCUMENTS, join="space", windows=3)]
    for limit, expected in ((None, 3), (2, 2), (5, 3)):
        ((_, result),) = measure_texts(tiny_model(), tiny_tokenizer(), texts, 32, limit, progress=False)
        assert result.windows == expected < result.all_windows


def test_what_cannot_be_measured_is_refused() -> None:
    small = tiny_config("llama")
    small.vocab_size = 64
    other = AutoModelForCausalLM.from_config(small)
    with pytest.raises(UserError, match="--teacher has a vocabulary of 64 tokens, the model one of 128"):
        measured(tiny_model(), DOCUMENTS, 32, teacher=other)
    short = tiny_config("llama")
    short.max_position_embeddings = 16
    with pytest.raises(UserError, match=r"--teacher: A window of 32 tokens .* longer than the model's 16 positions"):
        measured(tiny_model(), DOCUMENTS, 32, teacher=AutoModelForCausalLM.from_config(short))
    with pytest.raises(UserError, match="fewer than one window of 32"):
        measured(tiny_model(), ["two of four"], 32, stride=4)
    with pytest.raises(UserError, match="fewer than one window"):
        measured(tiny_model(), ["", ""], 32, join="separate")
    with pytest.raises(UserError, match="--stride 32 must be between 1 and 31"):
        measured(tiny_model(), DOCUMENTS, 32, stride=32)


def test_another_tokenizer_of_the_same_size_is_refused() -> None:
    class Reversed:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": tokens_of(text)[::-1]}

    check_tokens(tiny_tokenizer(), tiny_tokenizer(), DOCUMENTS)
    with pytest.raises(UserError, match="--teacher makes different tokens from the same text"):
        check_tokens(tiny_tokenizer(), Reversed(), ["", *DOCUMENTS])  # type: ignore[arg-type]
