"""From documents to training blocks: tokenise, pack, collate.

Both steps over the text are `datasets` maps with fingerprints of their own, so a second run with the same text,
tokenizer and block size reads the cache instead of working again.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.tokens.bos import NO_BOS, Bos
from ast_sparse.data.tokens.long_text import encoded
from ast_sparse.data.tokens.shard_writer import document_tokens, text_key
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.errors import UserError

_FORMAT_VERSION = 1  # part of every cache key: raise it when tokens or blocks come out differently
_DOCUMENTS_PER_BATCH = 256
_TOKENISED = Features({"input_ids": List(Value("int32")), "key": Value("uint64")})
LABELLED = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "key": Value("uint64")})
_TOKENS = List(Value("int32"))


def tokenise_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, text_field: str, name: str, bos: Bos = NO_BOS
) -> Dataset:
    """Tokenise every document and end it with one EOS; empty documents give no token.

    Args:
        documents: one document a row in the string column `text_field`.
        name: what messages and the progress bar call the text.
        bos: what stands before each document.

    Returns:
        One row a document, cached: `input_ids` (int32) and `key`, a 64-bit hash of the text.

    Raises:
        UserError: the tokenizer has no EOS token, or a row has no text.
    """
    eos, begin = eos_token(tokenizer), bos.of_document
    if text_field not in documents.column_names:
        raise UserError(f"{name} has no column `{text_field}` (`text_field`) but {', '.join(documents.column_names)}.")

    def tokenise(table: pa.Table, rows: list[int]) -> pa.Table:
        texts = table.column(text_field).to_pylist()
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                raise UserError(
                    f"{name}: row {row} has no text in `{text_field}` but {text!r:.40}. Leave such rows out."
                )
        pieces = list(token_ids(tokenizer, texts, eos, begin))
        keys = pa.array([text_key(text) for text in texts], type=pa.uint64())
        return pa.table({"input_ids": list_array(pieces), "key": keys})

    tokenised = documents.with_format("arrow").map(
        tokenise,
        with_indices=True,
        batched=True,
        batch_size=_DOCUMENTS_PER_BATCH,
        remove_columns=documents.column_names,
        features=_TOKENISED,
        # Hashing the tokenizer object would miss the cache: its truncation and padding state changes with use.
        new_fingerprint=Hasher.hash(
            (_FORMAT_VERSION, "tokenise", documents._fingerprint, text_field, tokenizer_key(tokenizer), eos, *begin)
        ),
        desc=f"Tokenising {name}",
    )
    return tokenised.with_format(None)


def with_labels(tokenised: Dataset) -> Dataset:
    """Documents as rows of chat data, every token a label; cached."""

    def add(table: pa.Table) -> pa.Table:
        tokens, keys = table.column("input_ids"), table.column("key")
        return pa.table({"input_ids": tokens, "labels": tokens, "key": keys})

    labelled = tokenised.with_format("arrow").map(
        add,
        batched=True,
        features=LABELLED,
        new_fingerprint=Hasher.hash((_FORMAT_VERSION, "labels", tokenised._fingerprint)),
        desc="Labels",
    )
    return labelled.with_format(None)


def eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a document.

    Raises:
        UserError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of `{tokenizer.name_or_path}` has no end-of-sequence token, which separates documents. "
            "Name one as `eos_token` in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides the tokens of a text, stable over runs and over calls of the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    state = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], eos: int, begin: tuple[int, ...] = ()
) -> Iterator[np.ndarray]:
    """The tokens of each text, int32 `[tokens]`, after those of `begin` and ended by EOS; of an empty one none."""

    def encode(group: list[str]) -> Any:
        # verbose=False: a document may be longer than the model's window, it is packed into blocks afterwards.
        return tokenizer(
            group, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]

    for text, ids in zip(texts, encoded(encode, texts), strict=True):
        yield document_tokens(text, ids, eos, begin).astype(np.int32)


def list_array(pieces: list[np.ndarray]) -> pa.ListArray:
    """Integers of several rows as one column."""
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int32)
    values = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def token_counts(tokenised: Dataset) -> np.ndarray:
    """Tokens of every document, int64 `[documents]`."""
    return pc.list_value_length(tokenised.data.column("input_ids")).to_numpy().astype(np.int64)


def document_keys(tokenised: Dataset) -> np.ndarray:
    """Hash of every document's text, uint64 `[documents]`."""
    return tokenised.data.column("key").to_numpy()


def pack_tokens(
    tokenised: Dataset, starts: np.ndarray, stops: np.ndarray, block_size: int, name: str, bos: Bos = NO_BOS
) -> Dataset:
    """Join the tokens `[start, stop)` of every document, in order, and cut them into blocks; the remainder is left out.

    Args:
        tokenised: from `tokenise_documents` or `tokenise_conversations`, several of them concatenated if need be.
        starts, stops: int64 `[documents]`.
        bos: what stands before each block, and counts in its size.

    Returns:
        `{"input_ids": block_size token ids}` a row, cached; of conversations `labels` and `position_ids` as well, which
            begin at 0 with each conversation, and with each block.
    """
    rows = np.flatnonzero(stops > starts)
    starts, stops = starts[rows], stops[rows]
    front = bos.of_block
    rule = ("always",) if front and bos.is_end else ()
    parts = (block_size, *(a.tobytes() for a in (rows, starts, stops)), *front, *rule)
    key = Hasher.hash((_FORMAT_VERSION, "pack", tokenised._fingerprint, *parts))
    columns = ["input_ids", *(("labels", "position_ids") if "labels" in tokenised.column_names else ())]
    # of one map batch into the next: one process, batches in order
    carried = {column: np.empty(0, dtype=np.int32) for column in columns}

    def stream(column: str, table: pa.Table, indices: list[int]) -> np.ndarray:
        is_position = column == "position_ids"
        documents = table.column("input_ids" if is_position else column).combine_chunks()
        tokens, offsets = documents.values.to_numpy(), documents.offsets.to_numpy()
        pieces = [tokens[o + starts[i] : o + stops[i]] for o, i in zip(offsets[:-1], indices, strict=True)]
        if is_position:
            pieces = [np.arange(len(piece), dtype=np.int32) for piece in pieces]
        return np.concatenate([carried[column], *pieces])

    def cut(table: pa.Table, indices: list[int]) -> pa.Table:
        streams = {column: stream(column, table, indices) for column in columns}
        begins, end = block_begins(streams["input_ids"], block_size, bos)
        blocks = {}
        for column, values in streams.items():
            carried[column] = values[end:].copy()
            blocks[column] = [
                _block(column, values[at : at + block_size - before], before, front) for at, before in begins
            ]
        return pa.table({column: list_array(pieces) for column, pieces in blocks.items()})

    packed = (
        tokenised.select(rows)
        .with_format("arrow")
        .map(
            cut,
            with_indices=True,
            batched=True,
            batch_size=_DOCUMENTS_PER_BATCH,
            remove_columns=tokenised.column_names,
            features=Features(dict.fromkeys(columns, _TOKENS)),
            new_fingerprint=key,
            desc=f"Packing {name}",
        )
    )
    return packed.with_format(None)


def block_begins(stream: np.ndarray, block_size: int, bos: Bos) -> tuple[list[tuple[int, int]], int]:
    """Where the whole blocks of a stream begin, how many tokens of BOS go before each, and where the last ends."""
    begins: list[tuple[int, int]] = []
    at = 0
    while True:
        before = len(bos.before_block(stream[at : at + len(bos.of_block)]))
        if at + block_size - before > len(stream):
            return begins, at
        begins.append((at, before))
        at += block_size - before


def _block(column: str, values: np.ndarray, before: int, front: tuple[int, ...]) -> np.ndarray:
    """A block of one column: `before` tokens of `front`, and its values."""
    if column == "position_ids":
        # A document that began in an earlier block begins anew; the first one begins with what stands before it.
        is_first = np.cumsum(values[1:] == 0) == 0
        values = np.concatenate([[before], np.where(is_first, values[1:] - values[0] + before, values[1:])])
        added = np.arange(before)
    else:
        added = np.asarray(front[:before] if column == "input_ids" else [IGNORE_INDEX] * before)
    return np.concatenate([added, values]).astype(np.int32)
