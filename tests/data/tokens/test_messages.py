"""What messages hold: text in parts, weights, tool calls, and nulls that Arrow fills in."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value

from ast_sparse.config import DataConfig
from ast_sparse.data.build import build_datasets
from ast_sparse.data.sources.conversations import ROW, read_row
from ast_sparse.data.sources.documents import read_conversations
from ast_sparse.data.tokens.chat import tokenise_conversations
from ast_sparse.data.tokens.chat_template import Chat
from ast_sparse.errors import UserError
from tests.data.chats import MARKED, PLAIN, counted, tokenizer

USER = {"role": "user", "content": "two of"}
HEAD = "{% for m in messages %}{{ m.role }}\n"
TAIL = "<|end|>\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
PARTS = HEAD + "{% for part in m.content %}{{ part.text }}{% endfor %}" + TAIL
CALLS = (
    HEAD + "{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ call.function.name }} ARGS{% endfor %}" + TAIL
)
TOJSON = CALLS.replace("ARGS", "{{ call.function.arguments | tojson }}")
PRINTED = CALLS.replace("ARGS", "{{ call.function.arguments }}")
JOINED = CALLS.replace("ARGS", "{{ '' + call.function.arguments }}")
ITEMS = CALLS.replace(
    "ARGS", "{% for key, value in call.function.arguments | items %}{{ key }}={{ value }};{% endfor %}"
)


def said(content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def call(arguments: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "move", "arguments": arguments}}],
    }


def as_json(rows: list[dict[str, Any]]) -> Dataset:
    """Rows as JSONL rows are stored in the cache."""
    return Dataset.from_dict({ROW: [json.dumps(row) for row in rows]})


def stretches(messages: list[dict[str, Any]], template: str = PLAIN, **columns: Any) -> list[str]:
    (row,) = tokenise_conversations(as_json([{"messages": messages, **columns}]), tokenizer(template), "chat")
    return counted(row)


def written(row: dict[str, Any], template: str) -> str:
    chat = Chat(tokenizer=tokenizer(template), where="row", tools=row.get("tools"))
    return chat.render(chat.settle(row["messages"]))


@pytest.mark.parametrize("template", [PLAIN, MARKED, PARTS, HEAD + "{{ m.content }}" + TAIL])
def test_parts_of_text_are_joined_or_read_by_the_template(template: str) -> None:
    messages = [{"role": "user", "content": parts("two ", "of four")}, said(parts("keeps the", " dense"))]
    found = written({"messages": messages}, template)
    assert "keeps the dense" in found and "two of four" in found and "type" not in found
    assert stretches(messages, template)[0].removesuffix("<|end|>") == "keeps the dense"


def test_parts_that_the_template_trims_keep_the_white_space_between_them() -> None:
    trimmed = "{% for part in m.content %}{{ part.text | trim }}{% endfor %}"
    messages = [{"role": "user", "content": parts("two ", "of four")}, said(parts("keeps ", "the dense"))]
    either = HEAD + "{% if m.content is string %}{{ m.content }}{% else %}" + trimmed + "{% endif %}" + TAIL
    assert "two of four<|end|>" in written({"messages": messages}, either)
    assert stretches(messages, either) == ["keeps the dense<|end|>"]
    # a template that reads only parts writes them its own way
    assert stretches(messages, HEAD + trimmed + TAIL) == ["keepsthe dense<|end|>"]


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_calls_without_content_are_read_where_the_template_joins_it(content: dict[str, Any]) -> None:
    message = {key: value for key, value in call({"x": 1}).items() if key != "content"} | content
    template = CALLS.replace("m.content or ''", "'' + m.content").replace(" ARGS", "")
    assert stretches([USER, message], template) == ["move<|end|>"]


def test_what_the_user_says_may_look_like_arguments() -> None:
    for says in ("move {'x': 1}", '"{\\"x\\": 1}"'):
        for arguments in ({"x": 1}, '{"x": 1}'):
            found = written({"messages": [{"role": "user", "content": says}, call(arguments)]}, TOJSON)
            assert says in found and 'move {"x": 1}<|end|>' in found


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (said([{"type": "image_url", "image_url": {"url": "x"}}]), "a part of type 'image_url'"),
        (said([*parts("two"), {"type": "thinking", "thinking": "two"}]), "a part of type 'thinking'"),
        (said(["two"]), 'the part "two"'),
        (said([{"text": "two"}]), "the part {"),
        (said(3), "`content` 3, which is not text"),
        (said({"text": "two"}), "which is not text"),
        (said(), "has no `content`"),
        ({"role": "tool"}, "has no `content`"),
        (said("two", weight=0.5), "`weight` 0.5. A message counts or does not"),
        (said("two", train="no"), '`train` "no"'),
        (said("two", train_detail=[{"train": False}]), "`train_detail`: parts of a message cannot be weighted"),
        ({**USER, "weight": 1}, "only what the assistant says is counted"),
    ],
)  # fmt: skip
def test_a_message_that_is_not_text_is_refused_by_row(message: dict[str, Any], reason: str) -> None:
    rows = as_json([{"messages": [USER, said("two")]}, {"messages": [USER, message]}])
    with pytest.raises(UserError) as error:
        list(tokenise_conversations(rows, tokenizer(), "chat"))
    assert str(error.value).startswith(f"chat, row 1: message 1 ({message['role']}) has ") and reason in str(
        error.value
    )


@pytest.mark.parametrize(
    "field", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_a_message_of_weight_0_is_not_counted(field: dict[str, Any], template: str) -> None:
    first, last = said("keeps", **field), said("moves", weight=1)
    assert stretches([USER, first, USER, last], template) == ["moves<|end|>"]
    assert stretches([USER, {**last, "weight": 0}, USER, said("moves")], template) == ["moves<|end|>"]
    pair = as_json([{"prompt": [USER], "completion": [first]}])
    assert tokenise_conversations(pair, tokenizer(template), "chat")[0]["labels"] == []
    mixed = as_json([{"prompt": [USER], "completion": [first, USER, last]}])
    with pytest.raises(UserError, match=r"row 0: some messages of `completion` have weight 0 and some do not"):
        tokenise_conversations(mixed, tokenizer(template), "chat")


def test_marks_that_change_with_later_turns_cannot_keep_weights() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.index > messages | length - 2 %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    with pytest.raises(UserError, match=r"row 0: the chat template marks earlier turns differently .* `weight`"):
        stretches([USER, said("keeps", weight=0), USER, said("moves")], template)


@pytest.mark.parametrize("change", ["{% if m.role == 'user' %}{{ m.content }}{% endif %}", "{{ m.content | upper }}"])
def test_a_template_that_does_not_write_what_the_assistant_says_is_refused(change: str) -> None:
    with pytest.raises(UserError, match=r"row 0: the chat template drops or rewrites `content` of message 1"):
        stretches([USER, said("keeps")], HEAD + change + TAIL)
    pair = as_json([{"prompt": [USER], "completion": [said("keeps")]}])
    with pytest.raises(UserError, match=r"row 0: the chat template drops or rewrites `content` of message 1"):
        tokenise_conversations(pair, tokenizer(HEAD + change + TAIL), "chat")


def test_tool_calls_and_reasoning_must_be_written_too() -> None:
    plain = HEAD + "{{ m.content }}" + TAIL
    with pytest.raises(UserError, match="drops or rewrites `tool_calls` of message 1"):
        stretches([USER, call({"x": 1})], plain)
    with pytest.raises(UserError, match="drops or rewrites `reasoning_content` of message 1"):
        stretches([USER, said("keeps", reasoning_content="late")], plain)
    # a template may leave out the thoughts of a turn that the user answers
    assert stretches([USER, said("keeps", reasoning_content="late"), USER, said("moves")], plain)
    forgets = HEAD + "{{ m.content.split('</think>')[-1] }}" + TAIL
    assert stretches([USER, said("<think>late</think>keeps"), USER, said("moves")], forgets)
    with pytest.raises(UserError, match="drops or rewrites `content` of message 1"):
        stretches([USER, said("<think>late</think>keeps")], forgets)
    assert stretches([USER, said("  keeps  ")], HEAD + "{{ m.content | trim }}" + TAIL) == ["keeps<|end|>"]


def test_a_role_that_the_template_drops_is_refused() -> None:
    template = HEAD + "{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}" + TAIL
    with pytest.raises(UserError, match=r'row 0: the chat template drops what message 0 says, of role "developer"'):
        stretches([{"role": "developer", "content": "weights"}, USER, said("keeps")], template)
    # a template may rewrite what the system says
    flags = HEAD + "{{ m.content | replace('/no_think', '') }}" + TAIL
    assert stretches([{"role": "system", "content": "/no_think"}, USER, said("keeps")], flags) == ["keeps<|end|>"]
    loud = HEAD + "{{ m.content if m.role == 'assistant' else m.content | upper }}" + TAIL
    assert stretches([USER, said("keeps")], loud) == ["keeps<|end|>"]


@pytest.mark.parametrize(
    "arguments", [{"x": 1, "n": None, "b": {"c": [True]}}, '{"x": 1, "n": null, "b": {"c": [true]}}']
)
def test_arguments_are_written_as_json_once(arguments: Any) -> None:
    for template in (TOJSON, PRINTED, JOINED):
        found = written({"messages": [USER, call(arguments)]}, template)
        assert 'move {"x": 1, "n": null, "b": {"c": [true]}}<|end|>' in found, template
    assert "move x=1;n=None;" in written({"messages": [USER, call(arguments)]}, ITEMS)


def test_arguments_that_are_not_json_are_refused_where_they_would_be_encoded_twice() -> None:
    assert 'move {"x<|end|>' in written({"messages": [USER, call('{"x')]}, PRINTED)
    with pytest.raises(
        UserError, match=r"row 0: the chat template writes the `arguments` of a tool call of message 1 as a"
    ):
        stretches([USER, call('{"x')], TOJSON)


TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {key: {"type": "s"}}}},
    }
    for name, key in (("move", "x"), ("keep", "y"))
]
ROWS = [
    {"messages": [USER, call({"x": 1})], "tools": TOOLS[:1]},
    {"messages": [USER, call({"y": {"a": [1, None]}})], "tools": TOOLS},
    {"messages": [USER, call({}), {"role": "tool", "content": "late"}, said("keeps")], "tools": TOOLS[1:]},
]


def test_nulls_that_arrow_made_are_taken_out(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    template = "{{ tools | tojson }}\n" + TOJSON
    expected = [written(row, template) for row in ROWS]
    assert not any("null" in text for text in (expected[0], expected[2]))
    for name in ("a.parquet", "a.jsonl"):
        rows = read_conversations(name, str(tmp_path), "--dataset")
        assert [written(row, template) for row in rows] == expected, name
    data = Dataset.from_list(ROWS)
    assert [written(read_row(row, data.features), template) for row in data] == expected
    plain = list(tokenise_conversations(as_json(ROWS), tokenizer(template), "chat"))
    hub = {"path": "json", "data_files": str(tmp_path / "a.jsonl")}
    flat = [token for row in plain for token in row["input_ids"]]
    for entry in ("a.jsonl", "a.parquet", hub):
        config = DataConfig(root=str(tmp_path), train=(entry,), eval_share=0.0, block_size=len(flat))
        (block,), _, _ = build_datasets(config, tokenizer(template))
        assert block["input_ids"] == flat, entry


def test_nulls_of_jsonl_and_of_json_features_stay(tmp_path: Path) -> None:
    row = {"messages": [USER, call({"x": None, "y": 1})]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(ROWS[0]) + "\n")
    first, second = read_conversations("a.jsonl", str(tmp_path), "--dataset")
    assert '{"x": null, "y": 1}' in written(first, TOJSON)
    assert second["tools"] == TOOLS[:1]  # the first line has none
    message = {"role": Value("string"), "content": Value("string"), "tool_calls": List(Json())}
    data = Dataset.from_list([row], features=Features({"messages": List(message)}))
    assert '{"x": null, "y": 1}' in written(read_row(data[0], data.features), TOJSON)


def test_json_columns_of_parquet_keep_their_nulls(tmp_path: Path) -> None:
    row = {"messages": [USER, call({"x": None, "y": 1})]}
    message = {"role": Value("string"), "content": Value("string"), "tool_calls": List(Json())}
    Dataset.from_list([row, ROWS[0]], features=Features({"messages": List(message)})).to_parquet(tmp_path / "a.parquet")
    first, second = read_conversations("a.parquet", str(tmp_path), "--dataset")
    assert '{"x": null, "y": 1}' in written(first, TOJSON) and '{"x": 1}' in written(second, TOJSON)


def test_a_column_that_only_later_files_have_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"messages": ROWS[0]["messages"]}]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has a column `tools`, but .*a\.parquet does not"):
        read_conversations("*.parquet", str(tmp_path), "--dataset")


def test_files_whose_calls_have_other_arguments_are_named_and_may_be_entries(tmp_path: Path) -> None:
    for name, row in zip("ab", ROWS, strict=False):
        pq.write_table(pa.Table.from_pylist([{"messages": row["messages"]}]), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"b\.parquet have columns of different types: .* give each its own entry"):
        read_conversations("*.parquet", str(tmp_path), "--dataset")
    config = DataConfig(root=str(tmp_path), train=("a.parquet", "b.parquet"), eval_share=0.0, block_size=16)
    assert build_datasets(config, tokenizer(TOJSON))[2].train.documents == 2  # type: ignore[union-attr]


def test_tools_and_settings_of_the_template_come_from_their_columns() -> None:
    template = "{{ tools | tojson }}{{ mood }}\n" + PLAIN
    tools = json.dumps([{"name": "move", "parameters": json.dumps({"type": "object"})}])
    for columns in ({"messages": [USER, said("keeps")]}, {"prompt": [USER], "completion": [said("keeps")]}):
        rows = Dataset.from_list([{**columns, "tools": tools, "chat_template_kwargs": {"mood": "dense"}}])
        (row,) = tokenise_conversations(rows, tokenizer(template), "chat")
        expected = '[{"name": "move", "parameters": {"type": "object"}}]dense\n' + tokenizer().apply_chat_template(
            [USER, said("keeps")], tokenize=False
        )
        assert row["input_ids"] == tokenizer()(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"tools": "{"}, r"row 0: `tools` is \"{\", which is not JSON"),
        ({"tools": {"name": "move"}}, r"row 0: `tools` is {.*, not a list of tools"),
        ({"tools": [3]}, r"row 0: `tools` contains 3, which is not a JSON schema"),
        ({"chat_template_kwargs": [3]}, r"row 0: `chat_template_kwargs` is \[3\], not a mapping"),
    ],
)
def test_columns_beside_the_messages_are_checked(columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        stretches([USER, said("keeps")], PLAIN, **columns)


@pytest.mark.parametrize("row", [{"messages": [USER, said("late \ud800")]}, {"prompt": "two", "completion": "\ud800"}])
def test_half_a_character_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"chat, row 0 contains half a character"):
        tokenise_conversations(as_json([row]), tokenizer(), "chat")
