"""From documents to training blocks: tokenise, pack, collate.

Both steps over the text are `datasets` maps with fingerprints of their own, so a second run with the same text,
tokenizer and block size reads the cache instead of working again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ast_sparse.config import CalibrationConfig
from ast_sparse.data.bos import NO_BOS, Bos
from ast_sparse.data.long_text import encoded
from ast_sparse.data.shard_writer import document_tokens, missing, text_key
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.errors import UserError

DOMAIN = "domain_index"  # column of a row of a mixture: the number of its domain

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
    parts = (block_size, *(a.tobytes() for a in (rows, starts, stops)), *front)
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
        begins, end = block_begins(streams["input_ids"], block_size, front)
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


def block_begins(stream: np.ndarray, block_size: int, front: tuple[int, ...]) -> tuple[list[tuple[int, int]], int]:
    """Where the whole blocks of a stream begin, how many tokens of `front` go before each, and where the last ends.

    A block whose text begins with `front` already, as a chat template writes it, gets no second one.
    """
    begins: list[tuple[int, int]] = []
    at = 0
    while True:
        before = len(missing(front, stream[at : at + len(front)]))
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


class CausalLMCollator:
    """Stack token rows to a batch; labels are the inputs unless a row brings its own.

    transformers' `DataCollatorForLanguageModeling` masks every label equal to the pad token: with pad = EOS, the usual
    choice for GPT-2 or LLaMA, a model would never learn to end a document. Here only padding is ignored.

    Args:
        pad_token_id: fills rows on the right where lengths differ; with None such a batch is refused.
        document_end: keep documents apart, which end with this token unless rows bring `position_ids`: positions begin
            at 0 with every document, which transformers' attention masks take for its border, and the first token of a
            document is no label. With None they are not kept apart.
        document_begin: BOS, where documents or blocks begin with it. It may be the token that ends documents (OPT).
    """

    def __init__(
        self, pad_token_id: int | None = None, document_end: int | None = None, document_begin: int | None = None
    ) -> None:
        self.pad_token_id = pad_token_id
        self.document_end = document_end
        self.document_begin = document_begin

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch.

        Args:
            features: rows with `input_ids` and perhaps `labels` and `attention_mask`: lists or tensors of one length.

        Returns:
            int64 `[batch, longest]`: `input_ids`, `labels` (-100 on padding), and `attention_mask` only if lengths
            differ or a row brings one; `position_ids` where documents are kept apart; `domain_index`, `[batch]`, if the
            rows have it.

        Raises:
            UserError: lengths differ and there is no pad token, or documents are to be kept apart; or a row's labels or
                mask differ in length from it.
        """
        rows = [_long(feature["input_ids"]) for feature in features]
        length = max(map(len, rows))
        is_ragged = any(len(row) != length for row in rows)
        if is_ragged and self.pad_token_id is None:
            raise UserError(
                "Rows of different lengths need padding, but the tokenizer has no pad token. Set `pad_token`."
            )
        labels = [
            _column(feature, "labels", row, _unpadded(feature, row))
            for feature, row in zip(features, rows, strict=True)
        ]
        batch = {
            "input_ids": _padded(rows, length, self.pad_token_id or 0),
            "labels": _padded(labels, length, IGNORE_INDEX),
        }
        if is_ragged or any(feature.get("attention_mask") is not None for feature in features):
            masks = [
                _column(feature, "attention_mask", row, torch.ones_like(row))
                for feature, row in zip(features, rows, strict=True)
            ]
            batch["attention_mask"] = _padded(masks, length, 0)
        if all(DOMAIN in feature for feature in features):
            batch[DOMAIN] = _long([feature[DOMAIN] for feature in features])
        return batch if self.document_end is None else self._apart(batch, features, self.document_end)

    def _apart(
        self, batch: dict[str, Tensor], features: Sequence[Mapping[str, Any]], document_end: int
    ) -> dict[str, Tensor]:
        if "attention_mask" in batch:
            raise UserError(
                "data.packing='documents' needs blocks of one length without padding, and these rows differ in length "
                "or bring an attention_mask. Pass packed blocks, or raw text, or take data.packing='joined'."
            )
        place = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        ends = torch.eq(batch["input_ids"], document_end)
        if self.document_begin == document_end:
            # BOS is the second of two in a row, or one alone at the begin of the block: nothing ends with it.
            before = torch.cat([~ends[:, 1:2], ends[:, :-1]], dim=1)
            ends = ends & ~before
        ends = ends[:, :-1]
        begins = F.pad(ends, (1, 0), value=True)
        positions = place - torch.where(begins, place, 0).cummax(dim=1).values
        for row, feature in enumerate(features):
            if feature.get("position_ids") is not None:
                positions[row] = _long(feature["position_ids"])
        labels = batch["labels"].masked_fill(positions == 0, IGNORE_INDEX)
        return {**batch, "labels": labels, "position_ids": positions}


def _long(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.long)


def _column(feature: Mapping[str, Any], name: str, row: Tensor, default: Tensor) -> Tensor:
    values = feature.get(name)
    if values is None:
        return default
    values = _long(values)
    if len(values) != len(row):
        raise UserError(f"A row has {len(row)} `input_ids` but {len(values)} `{name}`: the lengths must agree.")
    return values


def _unpadded(feature: Mapping[str, Any], row: Tensor) -> Tensor:
    """The row as its own labels, ignored where its attention mask is 0."""
    return row.masked_fill(_column(feature, "attention_mask", row, torch.ones_like(row)) == 0, IGNORE_INDEX)


def _padded(rows: list[Tensor], length: int, fill: int) -> Tensor:
    return torch.stack([F.pad(row, (0, length - len(row)), value=fill) for row in rows])


def calibration_samples(blocks: Any, config: CalibrationConfig, front: tuple[int, ...] = ()) -> Tensor:
    """Windows of packed text for one-shot pruning, chosen by `config.seed`.

    Args:
        blocks: rows `{"input_ids": ...}` of one length, as `pack_dataset` makes them: one stream cut into blocks.
        config: how many windows; their length, by default that of a block.
        front: tokens that every block begins with; so does every window.

    Returns:
        `[samples, seq_len]` int64.

    Raises:
        UserError: there are no such rows, or too few tokens.
    """
    if not isinstance(blocks, Sequence | Dataset) or not len(blocks) or "input_ids" not in blocks[0]:
        raise UserError(
            "There is no text to calibrate on: packed blocks (`input_ids`) are needed. Set calibration.data, or pass "
            "calibration_dataset."
        )
    seq_len = config.seq_len or len(blocks[0]["input_ids"])
    size, length = len(blocks[0]["input_ids"]) - len(front), seq_len - len(front)  # without `front`
    tokens = len(blocks) * size
    windows = tokens // length
    if windows < config.samples:
        raise UserError(
            f"The calibration text has {tokens:,} tokens, fewer than calibration.samples={config.samples} windows of "
            f"{seq_len:,}. Give more text, or lower calibration.samples or calibration.seq_len."
        )
    chosen = np.random.default_rng(config.seed).permutation(windows)[: config.samples]
    samples = _long(front).repeat(config.samples, 1)
    texts = torch.empty(config.samples, length, dtype=torch.long)
    for text, window in zip(texts, chosen.tolist(), strict=True):
        start = window * length
        rows = range(start // size, (start + length - 1) // size + 1)
        stream = torch.cat([_long(blocks[row]["input_ids"])[len(front) :] for row in rows])
        if len(stream) != len(rows) * size:
            raise UserError(
                f"The rows to calibrate on have different lengths, the first {size} tokens. Pass packed blocks as "
                "calibration_dataset."
            )
        text.copy_(stream[start % size :][:length])
    return torch.cat([samples, texts], dim=1)
