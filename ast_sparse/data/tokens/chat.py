"""Conversations and prompt-completion pairs as tokens, with labels only on what the assistant says.

Recognised by their columns, as TRL does: `prompt` and `completion` (both text, or both lists of messages), or
`messages`. `chat_template` decides what counts in messages. In a completion everything after the prompt counts, and in
plain text the EOS after it too. A token begins where the one before it ends, even if its offset leaves out white space;
one that begins before a turn is not part of it. No special tokens are added to those of the template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.sources.conversations import SETTINGS, chat_columns, read_row, read_settings, read_tools
from ast_sparse.data.sources.text_files import check_characters
from ast_sparse.data.tokens.chat_template import DATE, REFUSALS, Chat, Spans, refusal, template_text
from ast_sparse.data.tokens.messages import read_messages
from ast_sparse.data.tokens.shard_writer import missing, text_key
from ast_sparse.data.tokens.tokenise import LABELLED, check_rows, eos_token, list_array, tokenizer_key
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.errors import UserError, one_line

_FORMAT_VERSION = 2  # part of the cache key: raise it when tokens or labels come out differently
_ROWS_PER_BATCH = 256


def tokenise_conversations(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str, bos: tuple[int, ...] = ()
) -> Dataset:
    """Tokenise chat data; rows with nothing to count have no tokens.

    Args:
        rows: with the columns of `chat_columns`.
        name: what messages and the progress bar call the data.
        bos: tokens before a prompt and completion of plain text; a chat template writes its own.

    Returns:
        One row for each, cached: `input_ids`, `labels` (−100 where nothing is counted; int32) and `key`, a 64-bit hash.

    Raises:
        UserError: the tokenizer has no chat template, or no offsets; or a row is not a conversation.
    """
    columns = chat_columns(rows.column_names)
    chosen = rows.select_columns(columns).with_format(None)
    features = chosen.features
    check_rows(rows, name)
    check_chat_tokenizer(tokenizer, read_row(chosen[0], features), name)
    template, eos = str(getattr(tokenizer, "chat_template", None)), eos_token(tokenizer)

    def tokenise(batch: dict[str, list[Any]], numbers: list[int]) -> pa.Table:
        found = [
            _tokens(
                read_row(dict(zip(batch, values, strict=True)), features), tokenizer, eos, f"{name}, row {number}", bos
            )
            for number, values in zip(numbers, zip(*batch.values(), strict=True), strict=True)
        ]
        keys = [
            text_key(json.dumps(values, sort_keys=True, default=str)) for values in zip(*batch.values(), strict=True)
        ]
        return pa.table({
            "input_ids": list_array([ids for ids, _ in found]),
            "labels": list_array([labels for _, labels in found]),
            "key": pa.array(keys, type=pa.uint64()),
        })  # fmt: skip

    special = tokenizer.special_tokens_map  # what a template calls bos_token
    fixed = (template, str(DATE), special)
    parts = (_FORMAT_VERSION, "chat", rows._fingerprint, columns, tokenizer_key(tokenizer), fixed, eos, *bos)
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


def uncounted_rows(lengths: np.ndarray, name: str) -> str | None:
    """A line about rows with nothing to count, None if there are none.

    Args:
        lengths: tokens of each row, `[rows]`, as `tokenise_conversations` returns them.

    Raises:
        UserError: no row has anything to count.
    """
    rows = np.flatnonzero(lengths == 0)
    if not len(rows):
        return None
    if len(rows) == len(lengths):
        raise UserError(
            f"{name}: nothing is counted in any of {len(rows):,} rows. Each needs a message of role `assistant` that "
            "the chat template writes (and marks, if it has {% generation %})."
        )
    return f"{name}: rows left out because nothing in them is counted: {len(rows):,}, the first is row {rows[0]}"


def conversation_tokens(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, name: str, bos: tuple[int, ...] = ()
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and labels of rows that were read; arguments and errors as in `tokenise_conversations`."""
    eos = eos_token(tokenizer)
    for number, row in enumerate(rows):
        if not number:
            check_chat_tokenizer(tokenizer, row, name)
        yield _tokens(row, tokenizer, eos, f"{name}, row {number}", bos)


def check_chat_tokenizer(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], name: str) -> None:
    """Check that the tokenizer can write and tokenise the first row.

    Raises:
        UserError: it has no chat template, several and none of them the default, or no offsets.
    """
    if not getattr(tokenizer, "chat_template", None) and not isinstance(row.get("prompt"), str):
        raise UserError(
            f"{name} is chat data ({', '.join(row)}), and the tokenizer of `{tokenizer.name_or_path}` has no chat "
            "template. Use the tokenizer of a chat model, or put a chat_template.jinja into its folder."
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"{name} is chat data, and the tokenizer of `{tokenizer.name_or_path}` is a slow one, which does not "
            "say where tokens begin. Put a tokenizer.json into its folder."
        )
    if getattr(tokenizer, "chat_template", None):
        try:
            template_text(tokenizer, read_tools(row.get("tools"), f"{name}, row 0"))
        except UserError:
            raise
        except ValueError as error:  # several templates and none of them the default
            raise UserError(f"{name}: no chat template can be chosen: {one_line(error, 300, end='stop')}") from error


def _tokens(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    eos: int | None,
    where: str,
    bos: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels of a row, int32; both empty if nothing is counted. Only plain text ends with `eos`."""
    prompt, completion = row.get("prompt"), row.get("completion")
    try:
        if isinstance(prompt, str) and isinstance(completion, str):
            text, spans = prompt + completion, [(len(prompt), len(prompt) + len(completion))]
        else:
            text, spans, eos = *_turns(row, tokenizer, where), None
        check_characters(text, where)
        ids, counted = _counted(text, spans, tokenizer)
    except UserError:
        raise
    except REFUSALS as error:
        raise refusal(where, error) from error
    if eos is not None:
        bos = missing(bos, ids)
        ids, counted = [*bos, *ids, eos], [*(False for _ in bos), *counted, True]
    found = np.asarray(ids, dtype=np.int32)
    labels = np.where(np.asarray(counted, dtype=bool), found, IGNORE_INDEX).astype(np.int32)
    labels[:1] = IGNORE_INDEX  # nothing in the row predicts its first token
    is_empty = not (labels != IGNORE_INDEX).any()
    return (found[:0], labels[:0]) if is_empty else (found, labels)


def _turns(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, Spans]:
    """A row of messages as text, and the stretches that are counted."""
    tools = read_tools(row.get("tools"), where)
    chat = Chat(tokenizer=tokenizer, where=where, tools=tools, settings=read_settings(row.get(SETTINGS), where))
    if "messages" in row:
        messages, counted = read_messages(row["messages"], "messages", where)
        messages = chat.settle(messages)
        text, spans = chat.turns(messages, counted)
        chat.check_read(text, messages)
        return text, spans
    prompt, _ = read_messages(row["prompt"], "prompt", where)
    completion, counted = read_messages(row["completion"], "completion", where)
    messages = chat.settle(prompt + completion)
    text, spans = chat.completion(messages[: len(prompt)], messages[len(prompt) :], counted)
    chat.check_read(text, messages)
    return text, spans


def _counted(text: str, spans: Spans, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokens of the text, and whether each begins inside one of the spans (in characters)."""
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    counted, done = [], 0
    for start, end in encoded["offset_mapping"]:
        # if a character is several tokens, all of them begin where it does
        begin = start if end > start else done
        while begin > done and text[begin - 1].isspace():  # offsets may leave out white space
            begin -= 1
        counted.append(any(first <= begin < last for first, last in spans))
        done = max(done, end)
    return encoded["input_ids"], counted
