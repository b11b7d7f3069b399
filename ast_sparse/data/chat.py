"""Conversations and pairs of prompt and completion as tokens, with labels on what the assistant says alone.

Recognised by their columns, as TRL does: `prompt` and `completion` (both text, or both lists of messages), or
`messages`. The chat template is the tokenizer's. Where it marks the assistant's turns by `{% generation %}` its mask is
taken. Else the turns are told by prefixes: turn i is what rendering the messages up to it adds to rendering those
before it with the generation prompt, less white space at its end; a template that writes earlier turns otherwise when
more follow cannot be taken apart so, and is refused. Of a completion all is counted that follows the prompt, and of
plain text the EOS after it. A token that begins before a turn belongs to what stands before. No special tokens are
added to those of the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.conversations import chat_columns, read_row
from ast_sparse.data.files import one_line, shown
from ast_sparse.data.packing import LABELLED, eos_token, list_array, text_key, tokenizer_key
from ast_sparse.data.shard_writer import missing
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.errors import UserError

_FORMAT_VERSION = 1  # part of the cache key: raise it when tokens or labels come out differently
_ROWS_PER_BATCH = 256
_GENERATION = re.compile(r"\{%-?\s*generation\b")


def tokenise_conversations(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str, bos: tuple[int, ...] = ()
) -> Dataset:
    """Tokenise chat data; rows of which nothing is counted give no token.

    Args:
        rows: with the columns of `chat_columns`.
        name: what messages and the progress bar call the data.
        bos: tokens before a prompt and completion of plain text; a chat template writes its own.

    Returns:
        A row each, cached: `input_ids`, `labels` (−100 where nothing is counted; int32) and `key`, a 64-bit hash.

    Raises:
        UserError: the tokenizer has no chat template, or no offsets; a row that is no conversation.
    """
    columns = chat_columns(rows.column_names)
    if len(rows):
        _check_tokenizer(tokenizer, read_row({key: rows[0][key] for key in columns}), name)
    template, eos = str(getattr(tokenizer, "chat_template", None)), eos_token(tokenizer)

    def tokenise(batch: dict[str, list[Any]], numbers: list[int]) -> pa.Table:
        found = [
            _tokens(read_row(dict(zip(batch, values, strict=True))), tokenizer, eos, f"{name}, row {number}", bos)
            for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True)
        ]
        keys = [text_key(json.dumps(values, sort_keys=True)) for values in zip(*batch.values(), strict=True)]
        return pa.table({
            "input_ids": list_array([ids for ids, _ in found]),
            "labels": list_array([labels for _, labels in found]),
            "key": pa.array(keys, type=pa.uint64()),
        })  # fmt: skip

    chosen = rows.select_columns(columns)
    parts = (_FORMAT_VERSION, "chat", rows._fingerprint, columns, tokenizer_key(tokenizer), template, eos, *bos)
    tokenised = chosen.map(
        tokenise,
        with_indices=True,
        batched=True,
        batch_size=_ROWS_PER_BATCH,
        remove_columns=columns,
        features=LABELLED,
        new_fingerprint=Hasher.hash(parts),
        desc=f"Tokenising {name}",
    )
    return tokenised


def conversation_tokens(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str, bos: tuple[int, ...] = ()
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and labels of rows that were read; arguments and errors as of `tokenise_conversations`."""
    eos = eos_token(tokenizer)
    for number, row in enumerate(rows):
        if not number:
            _check_tokenizer(tokenizer, row, name)
        yield _tokens(row, tokenizer, eos, f"{name}, row {number}", bos)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], name: str) -> None:
    """Raise UserError unless the tokenizer can write and take apart what the first row holds."""
    if not getattr(tokenizer, "chat_template", None) and not isinstance(row.get("prompt"), str):
        raise UserError(
            f"{name} is chat data ({', '.join(row)}), and the tokenizer of `{tokenizer.name_or_path}` has no chat "
            "template. Take the tokenizer of a chat model, or put a chat_template.jinja into its folder."
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"{name} is chat data, and the tokenizer of `{tokenizer.name_or_path}` is a slow one, which does not say "
            "where tokens begin. Put a tokenizer.json into its folder."
        )


def _tokens(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos: int, where: str, bos: tuple[int, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels of a row, int32; both empty if nothing is counted."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        text, spans = prompt + completion, [(len(prompt), len(prompt) + len(completion))]
        ids, counted = _counted(text, spans, tokenizer)
        bos = missing(bos, ids)
        ids, counted = [*bos, *ids, eos], [*(False for _ in bos), *counted, True]
    else:
        try:
            ids, counted = _chat_tokens(row, tokenizer, where)
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(f"{where}: the chat template refuses it: {one_line(error)} Leave the row out.") from error
    found = np.asarray(ids, dtype=np.int32)
    labels = np.where(np.asarray(counted, dtype=bool), found, IGNORE_INDEX).astype(np.int32)
    labels[:1] = IGNORE_INDEX  # nothing of the row predicts its first token
    is_empty = not (labels != IGNORE_INDEX).any()
    return (found[:0], labels[:0]) if is_empty else (found, labels)


def _chat_tokens(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[bool]]:
    tools = row.get("tools") or None
    if "messages" not in row:
        prompt, whole = _messages(row["prompt"], "prompt", where), _messages(row["completion"], "completion", where)
        before = _render(tokenizer, prompt, tools, add_generation_prompt=True)
        text = _render(tokenizer, prompt + whole, tools)
        _check_prefix(text, before, where)
        return _counted(text, [(len(before), len(text.rstrip()))], tokenizer)
    messages = _messages(row["messages"], "messages", where)
    if _GENERATION.search(str(tokenizer.chat_template)):
        encoded: Any = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        return encoded["input_ids"], [bool(value) for value in encoded["assistant_masks"]]
    text = _render(tokenizer, messages, tools)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not index:
            raise UserError(f"{where}: the conversation begins with the assistant. Put what it answers before it.")
        before = _render(tokenizer, messages[:index], tools, add_generation_prompt=True)
        turn = _render(tokenizer, messages[: index + 1], tools)
        _check_prefix(turn, before, where)
        _check_prefix(text, turn, where)
        spans.append((len(before), len(turn.rstrip())))
    return _counted(text, spans, tokenizer)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool = False
) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _check_prefix(text: str, before: str, where: str) -> None:
    if not text.startswith(before):
        raise UserError(
            f"{where}: the chat template writes earlier turns otherwise when more follow, so what the assistant says "
            "cannot be told. Mark its turns by {% generation %} in the template, or give `prompt` and `completion` as "
            "text."
        )


def _messages(value: Any, column: str, where: str) -> list[dict[str, Any]]:
    is_chat = isinstance(value, list) and value
    if not is_chat or not all(isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in value):
        raise UserError(
            f"{where}: `{column}` is {shown(value)}, not a list of messages with `role` and `content`. Leave the row "
            "out."
        )
    return [{key: item for key, item in each.items() if item is not None} for each in value]


def _counted(
    text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Tokens of the text, and whether each begins inside one of the spans (in characters)."""
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    counted = [any(begin <= start < end for begin, end in spans) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], counted
