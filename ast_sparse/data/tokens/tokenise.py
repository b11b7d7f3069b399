"""Text to token ids, one document per row, cached by text, tokenizer and BOS."""

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
from ast_sparse.errors import UserError

FORMAT_VERSION = 1  # part of every cache key: raise it when tokens or blocks come out differently
DOCUMENTS_PER_BATCH = 256
_TOKENISED = Features({"input_ids": List(Value("int32")), "key": Value("uint64")})
LABELLED = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "key": Value("uint64")})


def tokenise_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, text_field: str, name: str, bos: Bos = NO_BOS
) -> Dataset:
    """Tokenise every document and end it with one EOS; empty documents have no tokens.

    Args:
        documents: one document a row in the string column `text_field`.
        name: what messages and the progress bar call the text.
        bos: what goes before each document.

    Returns:
        One row per document, cached: `input_ids` (int32) and `key`, a 64-bit hash of the text.

    Raises:
        UserError: the tokenizer has no EOS token, or a row has no text.
    """
    eos, begin = eos_token(tokenizer), bos.of_document
    if text_field not in documents.column_names:
        raise UserError(
            f"{name} has no column `{text_field}` (`text_field`), only {', '.join(documents.column_names)}."
        )
    check_rows(documents, name)

    def tokenise(table: pa.Table, rows: list[int]) -> pa.Table:
        texts = table.column(text_field).to_pylist()
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                raise UserError(f"{name}: row {row}: `{text_field}` is {text!r:.40}, not text. Leave such rows out.")
        tokens = list(token_ids(tokenizer, texts, eos, begin))
        keys = pa.array([text_key(text) for text in texts], type=pa.uint64())
        return pa.table({"input_ids": list_array(tokens), "key": keys})

    tokenised = documents.with_format("arrow").map(
        tokenise,
        with_indices=True,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        remove_columns=documents.column_names,
        features=_TOKENISED,
        # Hashing the tokenizer object would miss the cache: its truncation and padding state changes with use.
        new_fingerprint=Hasher.hash(
            (FORMAT_VERSION, "tokenise", documents._fingerprint, text_field, tokenizer_key(tokenizer), eos, *begin)
        ),
        desc=f"Tokenising {name}",
    )
    return tokenised.with_format(None)


def check_rows(documents: Dataset, name: str) -> None:
    """Check that a source is not empty: `Dataset.map` would then leave out the new columns.

    Raises:
        UserError: it has no rows.
    """
    if not len(documents):
        raise UserError(f"{name} has no rows. Remove it, or give it text.")


def with_labels(tokenised: Dataset) -> Dataset:
    """Documents as rows of chat data, every token a label; cached."""

    def add(table: pa.Table) -> pa.Table:
        tokens, keys = table.column("input_ids"), table.column("key")
        return pa.table({"input_ids": tokens, "labels": tokens, "key": keys})

    labelled = tokenised.with_format("arrow").map(
        add,
        batched=True,
        features=LABELLED,
        new_fingerprint=Hasher.hash((FORMAT_VERSION, "labels", tokenised._fingerprint)),
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
            "Set `eos_token` in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides the tokens of a text, stable across runs and calls of the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return Hasher.hash(tokenizer)
    state = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    if getattr(tokenizer, "split_special_tokens", False):
        state["split_special_tokens"] = True  # not part of the JSON
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], eos: int, begin: tuple[int, ...] = ()
) -> Iterator[np.ndarray]:
    """The tokens of each text, int32 `[tokens]`: `begin`, the tokens, EOS; none for an empty text."""

    def encode(group: list[str]) -> Any:
        # verbose=False: a document may be longer than the model's window; it is packed into blocks afterwards.
        return tokenizer(
            group, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]

    for text, ids in zip(texts, encoded(encode, texts), strict=True):
        yield document_tokens(text, ids, eos, begin).astype(np.int32)


def list_array(rows: list[np.ndarray]) -> pa.ListArray:
    """Integers of several rows as one column."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate(rows) if rows else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def token_counts(tokenised: Dataset) -> np.ndarray:
    """Tokens of every document, int64 `[documents]`."""
    return pc.list_value_length(tokenised.data.column("input_ids")).to_numpy().astype(np.int64)


def document_keys(tokenised: Dataset) -> np.ndarray:
    """Hash of every document's text, uint64 `[documents]`."""
    return tokenised.data.column("key").to_numpy()
