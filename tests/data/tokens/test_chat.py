"""Chat data: which tokens are counted, against the text itself; the same from every kind of source."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from ast_sparse.config import DataConfig
from ast_sparse.data.build import build_datasets
from ast_sparse.data.pack_dataset import pack_dataset
from ast_sparse.errors import UserError
from ast_sparse.evaluation.measure import measure_text
from ast_sparse.evaluation.perplexity import evaluate_blocks
from tests.data.chats import MARKED, PLAIN, ROWS, conversation, counted, made, tokenizer
from tests.models import generated_text, tiny_model, tiny_tokenizer

LAST_ONLY = "{% for m in messages %}{{ m['role'] }}: {% if loop.last %}{{ m['content'] }}{% endif %}\n{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Begin with the user.') }}{% endif %}" + PLAIN


SAID = [["keeps the dense masks<|end|>"], ["two<|end|>", "four masks move<|end|>"], ["moves<|end|>"]]


def test_what_the_assistant_says_is_counted_and_nothing_else() -> None:
    found = made(Dataset.from_dict({"messages": ROWS}))
    assert [counted(row) for row in found] == SAID
    for row, messages in zip(found, ROWS, strict=True):
        text = tokenizer().apply_chat_template(messages, tokenize=False)
        assert row["input_ids"] == tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_marks_of_the_template_and_prefixes_agree() -> None:
    rows = Dataset.from_dict({"messages": ROWS})
    by_marks = made(rows, MARKED)
    by_prefixes = made(rows, PLAIN)
    assert [row["input_ids"] for row in by_marks] == [row["input_ids"] for row in by_prefixes]
    assert [row["labels"] for row in by_marks] == [row["labels"] for row in by_prefixes]


def test_of_prompt_and_completion_the_completion_and_its_end_are_counted() -> None:
    pairs = {"prompt": ["two of", "", "late", "two of "], "completion": [" four masks", "move late", "", "four masks"]}
    found = made(Dataset.from_dict(pairs), None)
    assert counted(found[0]) == [" four masks<|end|>"]
    ids = tiny_tokenizer()("move late")["input_ids"] + [tiny_tokenizer().eos_token_id]
    assert found[1]["input_ids"] == ids and found[1]["labels"] == [-100, *ids[1:]]  # nothing predicts the first
    assert counted(found[2]) == ["<|end|>"]
    assert counted(found[3]) == [" masks<|end|>"]  # the token " four" begins in the prompt


def test_prompt_and_completion_may_be_messages() -> None:
    rows = Dataset.from_dict({"prompt": [messages[:-1] for messages in ROWS], "completion": [m[-1:] for m in ROWS]})
    found = made(rows)
    assert [row["input_ids"] for row in found] == [
        row["input_ids"] for row in made(Dataset.from_dict({"messages": ROWS}))
    ]
    assert [counted(row) for row in found] == [said[-1:] for said in SAID]


def test_a_conversation_without_an_answer_gives_no_token() -> None:
    (row,) = made(Dataset.from_dict({"messages": [conversation("two of four")]}))
    assert row["input_ids"] == row["labels"] == []


def test_files_and_data_sets_give_the_same_blocks(tmp_path: Path) -> None:
    rows = ROWS * 4
    data = Dataset.from_dict({"messages": rows, "source": ["x"] * len(rows)})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": row, "text": "x"}) + "\n" for row in rows))
    data.to_parquet(tmp_path / "a.parquet")
    expected = pack_dataset(data, tokenizer(), "text", 16)
    flat = [(token, label) for row in made(data) for token, label in zip(row["input_ids"], row["labels"], strict=True)]
    blocks = [pair for row in expected for pair in zip(row["input_ids"], row["labels"], strict=True)]
    assert blocks == flat[: len(blocks)] and len(flat) - len(blocks) < 16
    hub = {"path": "json", "data_files": str(tmp_path / "a.jsonl")}
    for entry in ("a.jsonl", "a.parquet", hub):
        config = DataConfig(root=str(tmp_path), train=(entry,), eval_share=0.0, block_size=16)
        blocks_of_file, _, report = build_datasets(config, tokenizer())
        assert list(blocks_of_file) == list(expected)
        assert report.train.documents == len(rows) and report.train.tokens == len(flat)


def test_perplexity_of_held_out_chat_is_over_what_is_counted() -> None:
    blocks = pack_dataset(Dataset.from_dict({"messages": ROWS * 4}), tokenizer(), "text", 16)
    model = tiny_model()
    losses: list[float] = []
    for row in blocks:
        with torch.no_grad():
            log_p = model.double()(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [-float(log_p[at - 1, label]) for at, label in enumerate(row["labels"]) if at and label != -100]
    result = evaluate_blocks(tiny_model(), blocks, progress=False)
    assert result.predicted_tokens == len(losses) and result.windows == len(blocks)
    assert result.mean_nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_held_out_prompts_alone_measure_nothing() -> None:
    with pytest.raises(UserError, match=r"Nothing in 1 held-out blocks is predicted: all labels are −100"):
        evaluate_blocks(tiny_model(), [{"input_ids": [1, 2, 3], "labels": [-100] * 3}], progress=False)
    with pytest.raises(UserError, match=r"Nothing is predicted in 1 windows: they contain only prompts"):
        rows = [{"messages": conversation("two of four weights while", "late")}]
        measure_text(tiny_model(), tokenizer(), rows, 4, 1, is_chat=True, progress=False)


@pytest.mark.parametrize("is_mixture", [False, True])
def test_of_raw_text_beside_chat_data_every_token_counts(tmp_path: Path, is_mixture: bool) -> None:
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))
    texts = [generated_text(4, seed=seed) for seed in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    names = ("chat.jsonl", "a.jsonl")
    sources: dict[str, Any] = (
        {"domains": {name[0]: {"train": name} for name in names}} if is_mixture else {"train": names}
    )
    config = DataConfig(root=str(tmp_path), eval_share=0.0, block_size=8, **sources)
    blocks, _, _ = build_datasets(config, tokenizer())
    rows = [token for row in made(Dataset.from_dict({"messages": ROWS})) for token in zip(*columns(row), strict=True)]
    raw = [(token, token) for text in texts for token in [*tiny_tokenizer()(text)["input_ids"], 0]]
    if is_mixture:
        rows, raw = rows[: len(rows) // 8 * 8], raw[: len(raw) // 8 * 8]
    expected = [*rows, *raw]
    found = [pair for block in blocks for pair in zip(*columns(block), strict=True)]
    assert len(found) > len(rows) + 8 and found == expected[: len(found)]
    positions = [place for block in blocks for place in block["position_ids"]]
    assert positions.count(0) >= len(ROWS) + len(texts)


def columns(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    return row["input_ids"], row["labels"]


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(UserError, match=r"is a slow one, which does not say where tokens begin"):
        made(Dataset.from_dict({"messages": ROWS}))


def test_a_cut_archive_is_named(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"messages": row, "id": seed}) + "\n" for seed in range(3000) for row in ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-100])
    config = DataConfig(root=str(tmp_path), train=("a.jsonl.gz",), eval_share=0.0, block_size=16)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read: .*Copy it again"):
        build_datasets(config, tokenizer())


@pytest.mark.parametrize(
    ("columns", "template", "message"),
    [
        ({"messages": ROWS}, None, r"chat is chat data \(messages\), and the tokenizer of .* has no chat template"),
        ({"messages": ROWS}, LAST_ONLY, r"chat, row 0: the chat template writes earlier turns differently.*generation"),
        ({"messages": [ROWS[1]]}, STRICT, r"row 0: the chat template refuses it: Begin with the user\. Leave the row"),
        ({"messages": [conversation("a", "b")[1:]]}, PLAIN, r"row 0: the conversation begins with the assistant"),
        ({"messages": [[]]}, PLAIN, r"row 0: `messages` is \[\], not a list of messages"),
        ({"messages": ["two of four"]}, PLAIN, r"row 0: `messages` is \"two of four\", not a list of messages"),
        ({"messages": [[{"content": "a"}]]}, PLAIN, r"row 0: `messages` is .*, not a list of messages with `role`"),
        ({"prompt": ["a"], "completion": [None]}, PLAIN, r"row 0: `prompt` is \"a\", not a list of messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from_is_one_line(columns: dict[str, Any], template: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        made(Dataset.from_dict(columns), template)
    assert "\n" not in str(error.value)
