"""Where turns and tokens begin, templates with marks, thoughts or the date, and rows without labels."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ast_sparse.config import DataConfig
from ast_sparse.data.build import build_datasets
from ast_sparse.data.calibration import calibration_blocks
from ast_sparse.data.pack_dataset import pack_dataset
from ast_sparse.data.tokens import chat_template
from ast_sparse.data.tokens.chat import conversation_tokens, tokenise_conversations
from ast_sparse.errors import UserError
from ast_sparse.evaluation.windows import tokenise_chat
from tests.data.chats import MARKED, PLAIN, ROWS, conversation, tokenizer
from tests.models import generated_text

THINKS = PLAIN.replace("{{ '<assistant>\n' }}", "{{ '<assistant>\n<think>\n' }}")
BARE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
TEXT = [generated_text(), "user assistant <think> über 😀 naïve 你好\n" * 4]


def byte_tokenizer(template: str, trims: bool, normalizer: Any = None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trims)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trims)
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", chat_template=template)


def space_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Like SentencePiece: a space before the text, bytes for unknown characters."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<|end|>", *(f"<0x{value:02X}>" for value in range(256))]
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", chat_template=template)


def byte_begins(tokens: list[str]) -> list[int]:
    """Where tokens of byte-level BPE begin, in bytes: each character of a token stands for one."""
    begins, done = [], 0
    for token in tokens:
        begins.append(done)
        done += len(token)
    return begins


SPOKEN = [
    conversation("two 😀", "😀😀 four", "über", " late  masks "),
    conversation("你", "好", "naïve\n", "\nmove"),
]


@pytest.mark.parametrize(
    "template",
    [PLAIN, MARKED, BARE],
)
@pytest.mark.parametrize("trims", [True, False])
def test_tokens_are_counted_that_begin_inside_a_turn(template: str, trims: bool) -> None:
    made = byte_tokenizer(template, trims)
    for messages, (ids, labels) in zip(
        SPOKEN, conversation_tokens([{"messages": m} for m in SPOKEN], made, "chat"), strict=True
    ):
        text = made.apply_chat_template(messages, tokenize=False)
        ends, spans = 0, []
        for message in messages:
            begin = text.index(message["content"], ends)
            ends = begin + len(message["content"])
            if message["role"] == "assistant":
                last = len(text[: ends + len("<|end|>") * ("<|end|>" in template)].rstrip())
                spans.append((len(text[:begin].encode()), len(text[:last].encode())))
        begins = byte_begins(made.convert_ids_to_tokens(ids.tolist()))
        expected = [any(begin <= place < end for begin, end in spans) for place in begins]
        assert (labels != -100).tolist() == expected


@pytest.mark.parametrize("kind", ["space", "lower"])
def test_other_tokenizers_count_the_same_words(kind: str) -> None:
    lower = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made = space_tokenizer(PLAIN) if kind == "space" else byte_tokenizer(PLAIN, True, lower)
    rows = [{"messages": conversation("Two of", "Keeps e\u0301 😀", "late", "moves")}]
    ((ids, labels),) = conversation_tokens(rows, made, "chat")
    text = made.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])
    if kind == "lower":
        text = bytes_of(made, [int(token) for token, label in zip(ids, labels, strict=True) if label != -100])
    words = text.replace("<|end|>", " ").lower()
    for word in ("keeps", "😀", "moves"):
        assert word in words
    assert "late" not in words and "assistant" not in words and "two" not in words


def bytes_of(made: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return decoders.ByteLevel().decode(made.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("trims", [True, False])
def test_marks_at_the_begin_of_the_text_end_where_they_end(trims: bool) -> None:
    template = "{% generation %}{{ messages[1].content }}{% endgeneration %}\n{{ messages[0].content }}"
    made = byte_tokenizer(template, trims)
    ((ids, labels),) = conversation_tokens([{"messages": conversation("two of four", "keeps the")}], made, "chat")
    kept = [int(token) for token, label in zip(ids, labels, strict=True) if label != -100]
    first = int(ids[0])
    assert bytes_of(made, [first, *kept]) == "keeps the"  # nothing predicts the first


def test_marks_inside_a_macro_are_refused() -> None:
    template = (
        "{% macro say(m) %}{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    with pytest.raises(
        UserError, match=r"row 0: what the {% generation %} marks .* enclose is not what the assistant says"
    ):
        list(conversation_tokens([{"messages": ROWS[0]}], tokenizer(template), "chat"))


@pytest.mark.parametrize("said", ["keeps", "<b keeps", "a"])
def test_a_generation_prompt_that_opens_a_thought_is_left_out(said: str) -> None:
    rows = [
        {"messages": conversation("two of", said, "late", "moves")},
        {"prompt": conversation("two"), "completion": conversation("", said)[1:]},
    ]
    for row in rows:
        made = byte_tokenizer(THINKS, True)
        ((ids, labels),) = conversation_tokens([row], made, "chat")
        text = bytes_of(made, [int(token) for token, label in zip(ids, labels, strict=True) if label != -100])
        assert text == "<|end|>".join([said, *(["moves"] if "messages" in row else []), ""])


def test_a_thought_that_the_turn_closes_is_not_cut() -> None:
    template = THINKS.replace(
        "message['content']", "('</think>' if message.role == 'assistant' else '') + message.content"
    )
    ((_, labels),) = conversation_tokens([{"messages": ROWS[2]}], byte_tokenizer(template, True), "chat")
    kept = [int(token) for token in labels if token != -100]
    assert bytes_of(byte_tokenizer(template, True), kept) == "</think>moves<|end|>"


def test_a_call_that_begins_as_the_thought_of_the_prompt_is_counted_whole() -> None:
    template = THINKS.replace("message['content']", "(message.content or '<tool_call>' ~ message.tool_calls[0].name)")
    made = byte_tokenizer(template, True)
    messages = [*conversation("two"), {"role": "assistant", "tool_calls": [{"name": "move"}]}]
    ((ids, labels),) = conversation_tokens([{"messages": messages}], made, "chat")
    kept = [int(token) for token, label in zip(ids, labels, strict=True) if label != -100]
    assert bytes_of(made, kept) == "<tool_call>move<|end|>"


def test_a_thought_that_the_prompt_opens_is_not_counted_twice() -> None:
    made = byte_tokenizer(THINKS, True)
    ((ids, labels),) = conversation_tokens(
        [{"messages": conversation("two", "<think>\nlate</think>moves")}], made, "chat"
    )
    kept = [int(token) for token, label in zip(ids, labels, strict=True) if label != -100]
    assert bytes_of(made, kept) == "late</think>moves<|end|>"


def test_a_generation_prompt_that_is_no_begin_of_the_turn_is_named() -> None:
    template = PLAIN.replace("{{ '<assistant>\n' }}", "{{ 'GO' }}")
    with pytest.raises(UserError, match=r"row 0: the chat template's generation prompt ends in .*GO\"") as error:
        list(conversation_tokens([{"messages": ROWS[0]}], tokenizer(template), "chat"))
    assert "earlier turns" not in str(error.value)


def test_own_errors_pass_through() -> None:
    with pytest.raises(UserError) as error:
        list(conversation_tokens([{"messages": []}], tokenizer(), "chat"))
    assert str(error.value).count("Leave the row out") == 1 and "refuses" not in str(error.value)


class Later(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls(2031, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("marks", [PLAIN, MARKED])
def test_the_date_is_the_same_on_every_day(marks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = byte_tokenizer("{{ strftime_now('%d %b %Y, %-d.%-m. %H:%M 5%%') }}\n" + marks, True)
    rows = [{"messages": ROWS[0]}]
    ((before, _),) = conversation_tokens(rows, made, "chat")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    ((after, _),) = conversation_tokens(rows, made, "chat")
    assert before.tolist() == after.tolist()
    rest = byte_tokenizer(marks, True).apply_chat_template(ROWS[0], tokenize=False)
    assert made.decode(before) == "26 Jul 2024, 26.7. 00:00 5%\n" + rest


def test_the_date_is_written_as_strftime_does() -> None:
    directives = [f"%{letter}" for letter in "aAbBcdDefFGhHIjmMprRSTuUVwWxXyYZz"]
    calls = "".join("{{ strftime_now('" + directive + "') }}|" for directive in directives)
    chat = chat_template.Chat(tokenizer=tokenizer(calls), where="row")
    assert chat.render(ROWS[0]).split("|")[:-1] == [chat_template.DATE.strftime(each) for each in directives]


def test_the_macro_of_the_date_changes_nothing_else() -> None:
    for begin in ("\n", "  {% if true %}x{% endif %}\n", " x", "{# a #}\n"):
        made = byte_tokenizer(begin + "{% if false %}{{ strftime_now('%d') }}{% endif %}" + PLAIN, True)
        chat = chat_template.Chat(tokenizer=made, where="row")
        assert chat.render(ROWS[0]) == made.apply_chat_template(ROWS[0], tokenize=False)


def test_the_cache_knows_what_changes_tokens() -> None:
    rows = Dataset.from_dict({"messages": ROWS})
    made = byte_tokenizer("{{ bos_token }}" + PLAIN, True)
    made.bos_token = "a"
    first = tokenise_conversations(rows, made, "chat")[0]["input_ids"]
    made.bos_token = "b"
    assert tokenise_conversations(rows, made, "chat")[0]["input_ids"] != first


def test_a_template_that_draws_at_random_is_refused() -> None:
    with pytest.raises(UserError, match=r"uses random numbers"):
        tokenise_conversations(
            Dataset.from_dict({"messages": ROWS}), tokenizer("{{ [1, 2] | random }}" + PLAIN), "chat"
        )


def test_a_broken_template_is_not_blamed_on_the_row() -> None:
    with pytest.raises(UserError, match=r"row 0: the chat template cannot be read: .*Correct chat_template\.jinja\.$"):
        tokenise_conversations(Dataset.from_dict({"messages": ROWS}), tokenizer("{% nothing %}" + PLAIN), "chat")


def test_a_thought_that_the_template_reopens_is_counted() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}"
        "\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    made = byte_tokenizer(template, True)
    messages = [*conversation("two"), {"role": "assistant", "content": "moves", "reasoning_content": "late"}]
    ((ids, labels),) = conversation_tokens([{"messages": messages}], made, "chat")
    kept = [int(token) for token, label in zip(ids, labels, strict=True) if label != -100]
    assert bytes_of(made, kept) == "<think>\nlate\n</think>\n\nmoves<|end|>"


FORGETS = (
    "{% for m in messages %}{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% if quick %}<think>\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("quick", [True, False])
def test_a_thought_that_the_template_leaves_out_of_earlier_turns_is_not_counted(quick: bool) -> None:
    made = byte_tokenizer(FORGETS, True)
    row = {"messages": conversation("two", "keeps", "of", "moves"), "chat_template_kwargs": {"quick": quick}}
    ((ids, labels),) = conversation_tokens([row], made, "chat")
    kept = [int(token) for token, label in zip(ids, labels, strict=True) if label != -100]
    assert bytes_of(made, kept) == "keeps<|end|>" + "<think>\n</think>\n\n" * (not quick) + "moves<|end|>"
    row["messages"] = conversation("two", "keeps", "of")
    ((ids, labels),) = conversation_tokens([row], made, "chat")
    assert bytes_of(made, [int(token) for token in labels if token != -100]) == "keeps<|end|>"


def test_an_eos_that_ends_the_conversation_ends_no_earlier_turn() -> None:
    rows = [{"messages": conversation("two", "keeps", "of", "moves")}]
    template = PLAIN.replace("<|end|>", "<|stop|>").replace("{% endif %}", "{% else %}<|end|>{% endif %}")
    made = byte_tokenizer(template, True)
    made.add_tokens(["<|stop|>"])
    ((_, labels),) = conversation_tokens(rows, made, "chat")
    text = made.decode([int(token) for token in labels if token != -100])
    assert text == "keeps<|stop|>moves<|stop|>\n<|end|>"
    # if the EOS itself ends the last turn, another token may end those before it
    swapped = PLAIN.replace("'<|end|>'", "('<|end|>' if loop.last else '<|stop|>')")
    made.chat_template = swapped
    with pytest.raises(UserError, match=r"row 0: the chat template writes earlier turns differently when more follow"):
        list(conversation_tokens(rows, made, "chat"))


def test_several_templates_without_a_default_are_refused() -> None:
    made = tokenizer()
    made.chat_template = {"a": PLAIN, "b": PLAIN}
    with pytest.raises(UserError, match=r"chat: no chat template can be chosen: .*no default"):
        tokenise_conversations(Dataset.from_dict({"messages": ROWS}), made, "chat")


def test_rows_of_which_nothing_is_counted_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, conversation("two of"), *ROWS, conversation("late")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = DataConfig(root=str(tmp_path), train=("a.jsonl",), eval_share=0.0, block_size=16)
    report = build_datasets(config, tokenizer())[2]
    line = "rows left out because nothing in them is counted: 2, the first is row 3"
    assert report.lines()[-1] == f"warning: a.jsonl: {line}" and report.empty_documents == 0
    pack_dataset(Dataset.from_dict({"messages": rows}), tokenizer(), "text", 16)
    calibration_blocks(["a.jsonl"], str(tmp_path), "text", tokenizer(), 16)
    tokenise_chat(tokenizer(), [{"messages": row} for row in rows], "the text")
    assert [record.message for record in caplog.records if line in record.message] == [
        f"the data set: {line}", f"a.jsonl: {line}", f"the text: {line}",
    ]  # fmt: skip


def test_a_text_of_which_nothing_is_counted_is_refused(tmp_path: Path) -> None:
    rows = [conversation("two of")] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = DataConfig(root=str(tmp_path), train=("a.jsonl",), eval_share=0.0, block_size=16)
    for run in (
        lambda: build_datasets(config, tokenizer()),
        lambda: pack_dataset(Dataset.from_dict({"messages": rows}), tokenizer(), "text", 16),
        lambda: calibration_blocks(["a.jsonl"], str(tmp_path), "text", tokenizer(), 16),
        lambda: tokenise_chat(tokenizer(), [{"messages": row} for row in rows], "a.jsonl"),
    ):
        with pytest.raises(UserError, match=r": nothing is counted in any of 3 rows"):
            run()


def test_a_conversation_under_another_name_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "two"}]}) + "\n")
    config = DataConfig(root=str(tmp_path), train=("a.jsonl",), eval_share=0.0, block_size=16)
    with pytest.raises(UserError, match=r"recognised by `messages`, with `role` and `content`: rename `conversations`"):
        build_datasets(config, tokenizer())
