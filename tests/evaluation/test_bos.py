"""BOS in windows: the published protocol as the tokenizer follows it, no BOS, and one before each window."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ast_sparse.errors import UserError
from ast_sparse.evaluation.measure import TextResult, measure_text
from ast_sparse.evaluation.perplexity import evaluate_text, perplexity
from ast_sparse.evaluation.samples import continue_prompts
from tests.cli.eval_runs import refused, run, table
from tests.data.bos_models import BOS, EOS, bos_tokenizer, chat, plain, save_bos_model
from tests.models import generated_text, save_tiny_model, tiny_model

ROWS = [generated_text(count, seed) for seed, count in enumerate((9, 1, 5, 20, 2))]
TEXT = "\n\n".join(ROWS)
Windows = list[tuple[list[int], list[int]]]  # tokens, and the indices that are predicted


def twin(windows: Windows, seed: int = 0) -> tuple[float, int]:
    """Perplexity of a plain loop in float64, and its tokens."""
    model, losses = tiny_model(seed=seed).double().eval(), []
    for tokens, places in windows:
        with torch.no_grad():
            log_p = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        losses += [-float(log_p[at - 1, tokens[at]]) for at in places]
    return math.exp(sum(losses) / len(losses)), len(losses)


def published(size: int) -> Windows:
    """As in Wanda's and SparseGPT's code: the joined text is tokenised in one call, then cut."""
    ids = bos_tokenizer()("\n\n".join(ROWS))["input_ids"]
    return [(ids[at : at + size], list(range(1, size))) for at in range(0, len(ids) - size + 1, size)]


def begun(size: int) -> Windows:
    ids = plain(TEXT)
    texts = [ids[at : at + size - 1] for at in range(0, len(ids) - size + 2, size - 1)]
    return [([BOS, *text], list(range(1, size))) for text in texts]


def check(result: Any, windows: Windows) -> None:
    expected, count = twin(windows)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.predicted_tokens, result.windows) == (count, len(windows))


def measured(bos: str, **options: Any) -> TextResult:
    return measure_text(tiny_model(), bos_tokenizer(), ROWS, 32, bos=bos, progress=False, **options)


@pytest.mark.parametrize("bos", ["auto", "document"])
def test_by_default_windows_are_those_of_the_published_code(bos: str) -> None:
    windows = published(32)
    assert windows[0][0][0] == BOS and all(BOS not in tokens for tokens, _ in windows[1:])
    check(measured(bos), windows)
    check(evaluate_text(tiny_model(), bos_tokenizer(), ROWS, 32, bos=bos, progress=False), windows)
    assert perplexity(tiny_model(), bos_tokenizer(), TEXT, 32) == pytest.approx(twin(windows)[0], rel=1e-5)


def test_none_leaves_it_out() -> None:
    ids = plain(TEXT)
    windows = [(ids[at : at + 32], list(range(1, 32))) for at in range(0, len(ids) - 31, 32)]
    check(measured("none"), windows)
    assert perplexity(tiny_model(), bos_tokenizer(), TEXT, 32, bos="none") == pytest.approx(twin(windows)[0], rel=1e-5)


@pytest.mark.parametrize("bos", ["window", "block"])
def test_each_window_begins_with_it_and_predicts_all_of_its_text(bos: str) -> None:
    windows = begun(32)
    check(measured(bos), windows)
    check(evaluate_text(tiny_model(), bos_tokenizer(), ROWS, 32, bos=bos, progress=False), windows)
    assert measured(bos).bos == "window"
    assert measured(bos).scored_bytes == len(bos_tokenizer().decode(plain(TEXT)[: 31 * len(windows)]).encode())


@pytest.mark.parametrize("bos", ["auto", "window"])
def test_text_that_brings_its_bos_gets_no_second_one(bos: str) -> None:
    tokens = [BOS, *plain("two of four weights")]
    result = measure_text(
        tiny_model(), bos_tokenizer(), ["<s>two of four weights"], 32, join="separate", bos=bos, progress=False
    )
    check(result, [(tokens, list(range(1, len(tokens))))])


def test_overlapping_windows_score_every_token_once() -> None:
    ids, windows, done = plain(TEXT), [], 0
    for begin in range(0, len(ids), 20):
        end = min(begin + 31, len(ids))
        if done < len(ids):
            windows.append(([BOS, *ids[begin:end]], list(range(1 + done - begin, 1 + end - begin))))
        done = end
    result = measured("window", stride=20)
    check(result, windows)
    assert result.predicted_tokens == len(ids) and result.scored_bytes == len(TEXT.encode())
    assert measured("window", stride=31).predicted_tokens == len(ids)
    first = measured("auto", stride=20)  # BOS predicts the first token of the text and is not predicted itself
    assert first.predicted_tokens == len(ids) and first.scored_bytes == len(TEXT.encode())


def test_each_document_that_is_tokenised_by_itself_begins_with_it() -> None:
    windows = []
    for ids in map(plain, ROWS):
        tokens = [BOS, *ids]
        for at in range(0, len(tokens), 32):
            window = tokens[at : at + 32]
            windows += [(window, list(range(1, len(window))))] if len(window) > 1 else []
    result = measured("auto", join="separate")
    check(result, windows)
    stream = [token for index, ids in enumerate(map(plain, ROWS)) for token in [*([EOS] if index else []), BOS, *ids]]
    cut = [stream[at : at + 32] for at in range(0, len(stream) - 31, 32)]
    check(measured("auto", join="eos"), [(w, [at for at in range(1, 32) if w[at] != BOS]) for w in cut])


def test_a_teacher_reads_the_same_tokens() -> None:
    teacher = tiny_model(seed=1)
    result, kl = measured("window", teacher=teacher), []
    for tokens, places in begun(32):
        with torch.no_grad():
            ours, theirs = (
                model.double().eval()(torch.tensor([tokens])).logits[0].log_softmax(-1)
                for model in (tiny_model(), teacher)
            )
        kl += [float((theirs[at - 1].exp() * (theirs[at - 1] - ours[at - 1])).sum()) for at in places]
    assert result.teacher_kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)


def test_chat_keeps_the_bos_of_its_template() -> None:
    rows = [{"messages": [{"role": "user", "content": "two of"}, {"role": "assistant", "content": " four weights"}]}]
    tokens = [BOS, *plain("two of"), EOS, *plain(" four weights"), EOS]
    answer = len(plain(" four weights")) + 1
    for bos in ("auto", "none", "document", "window"):
        result = measure_text(
            tiny_model(), chat(bos_tokenizer()), rows, 32, is_chat=True, bos=bos, progress=False
        )  # fmt: skip
        check(result, [(tokens, list(range(len(tokens) - answer, len(tokens))))])


def test_ast_eval_takes_it_and_says_what_it_means(tmp_path: Path) -> None:
    model = save_bos_model(tmp_path / "model")
    (tmp_path / "a.txt").write_text(TEXT)
    text = (model, "--dataset", tmp_path / "a.txt", "--seq-len", "32", "--json", tmp_path / "out.json")
    for bos, windows, note in (
        ((), published(32), "BOS is only at the start of each document or text (--bos auto)"),
        (("--bos", "window"), begun(32), None),
        (("--bos", "block"), begun(32), None),
    ):
        result = run(*text, *bos)
        assert table(result)[2][-1] == f"{twin(windows)[0]:.2f}"
        assert (note is None and "Note" not in result.stderr) or (note is not None and note in result.stderr)
        record = json.loads((tmp_path / "out.json").read_text())
        assert record["results"][0]["bos"] == ("window" if bos else "document")
    save_tiny_model(tmp_path / "bare")
    assert "Note" not in run(tmp_path / "bare", *text[1:]).stderr
    message = refused(tmp_path / "bare", *text[1:], "--bos", "window")
    assert f"--bos='window': the tokenizer of '{tmp_path / 'bare'}' has no BOS token. Set --bos to none" in message


def test_prompts_are_continued_after_bos_and_without_the_eos_of_the_tokenizer() -> None:
    model = tiny_model()
    found = continue_prompts(model, bos_tokenizer("<s> $A <|end|>"), ["two of four"])
    assert found == continue_prompts(model, bos_tokenizer(), ["two of four"])
    expected = generated(model, [BOS, *plain("two of four")])
    assert found["two of four"] == expected
    bare = continue_prompts(model, bos_tokenizer(), ["two of four"], bos="none")
    assert bare["two of four"] == generated(model, plain("two of four"))


def generated(model: PreTrainedModel, ids: list[int]) -> str:
    tokens = list(ids)
    for _ in range(48):
        with torch.no_grad():
            tokens.append(int(model.eval()(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return str(bos_tokenizer().decode(tokens[len(ids) :], skip_special_tokens=True))


def test_a_window_needs_an_embedding_for_its_bos() -> None:
    config = tiny_model().config
    config.vocab_size = BOS
    with pytest.raises(UserError, match=f"makes the token {BOS}, but the model has {BOS} embeddings"):
        measure_text(AutoModelForCausalLM.from_config(config), bos_tokenizer(), ROWS, 32, bos="window", progress=False)
