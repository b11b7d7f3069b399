"""Pack tokenised documents into training blocks of equal length.

Packing is a `datasets` map with its own fingerprint, so a second run with the same text, tokenizer and block size reads
the cache.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from ast_sparse.data.tokens.bos import NO_BOS, Bos
from ast_sparse.data.tokens.tokenise import DOCUMENTS_PER_BATCH, FORMAT_VERSION, list_array
from ast_sparse.distillation.logits import IGNORE_INDEX

_TOKENS = List(Value("int32"))


def pack_tokens(
    tokenised: Dataset, starts: np.ndarray, stops: np.ndarray, block_size: int, name: str, bos: Bos = NO_BOS
) -> Dataset:
    """Join the tokens `[start, stop)` of every document, in order, and cut them into blocks; the remainder is left out.

    Args:
        tokenised: from `tokenise_documents` or `tokenise_conversations`, or several of them concatenated.
        starts, stops: int64 `[documents]`.
        bos: what goes before each block; it counts towards the size.

    Returns:
        `{"input_ids": block_size token ids}` a row, cached; for conversations also `labels` and `position_ids`, which
            begin at 0 in each conversation and in each block.
    """
    rows, starts, stops, key = _chosen("pack", tokenised, starts, stops, block_size, bos)
    front = bos.of_block
    columns = ["input_ids", *(("labels", "position_ids") if "labels" in tokenised.column_names else ())]
    # from one map batch to the next: one process takes the batches in order
    carried = {column: np.empty(0, dtype=np.int32) for column in columns}

    def stream(column: str, table: pa.Table, indices: list[int]) -> np.ndarray:
        is_position = column == "position_ids"
        found = _ranges(table, "input_ids" if is_position else column, starts[indices], stops[indices])
        if is_position:
            found = [np.arange(len(part), dtype=np.int32) for part in found]
        return np.concatenate([carried[column], *found])

    def cut(table: pa.Table, indices: list[int]) -> pa.Table:
        streams = {column: stream(column, table, indices) for column in columns}
        begins, end = block_begins(streams["input_ids"], block_size, bos)
        blocks = {}
        for column, values in streams.items():
            carried[column] = values[end:].copy()
            blocks[column] = [
                _block(column, values[at : at + block_size - before], before, front) for at, before in begins
            ]
        return pa.table({column: list_array(found) for column, found in blocks.items()})

    return _mapped(tokenised.select(rows), cut, Features(dict.fromkeys(columns, _TOKENS)), key, f"Packing {name}")


def _chosen(
    purpose: str, tokenised: Dataset, starts: np.ndarray, stops: np.ndarray, block_size: int, bos: Bos
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """The rows that have tokens, where these begin and end, and the fingerprint of what a purpose makes of them."""
    rows = np.flatnonzero(stops > starts)
    starts, stops = starts[rows], stops[rows]
    rule = ("always",) if bos.of_block and bos.is_end else ()
    parts = (block_size, *(a.tobytes() for a in (rows, starts, stops)), *bos.of_block, *rule)
    return rows, starts, stops, Hasher.hash((FORMAT_VERSION, purpose, tokenised._fingerprint, *parts))


def _mapped(
    documents: Dataset, function: Callable[[pa.Table, list[int]], pa.Table], features: Features, key: str, label: str
) -> Dataset:
    """What a function makes of a table of documents and their numbers at a time, in order; cached under `key`."""
    mapped = documents.with_format("arrow").map(
        function,
        with_indices=True,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        remove_columns=documents.column_names,
        features=features,
        new_fingerprint=key,
        desc=label,
    )
    return mapped.with_format(None)


def left_over(
    tokenised: Dataset, starts: np.ndarray, stops: np.ndarray, block_size: int, name: str, bos: Bos = NO_BOS
) -> int:
    """How many tokens `pack_tokens` leaves out; arguments as there. If the text must be read for it, it is cached."""
    if not bos.of_block or bos.is_end:
        return int((stops - starts).sum()) % (block_size - len(bos.of_block))
    rows, starts, stops, key = _chosen("left over", tokenised, starts, stops, block_size, bos)
    rest = np.empty(0, dtype=np.int32)  # how much of a block is BOS of its own depends on the text

    def count(table: pa.Table, indices: list[int]) -> pa.Table:
        nonlocal rest
        stream = np.concatenate([rest, *_ranges(table, "input_ids", starts[indices], stops[indices])])
        rest = stream[block_begins(stream, block_size, bos)[1] :].copy()
        return pa.table({"tokens": [len(rest)]})

    features, label = Features({"tokens": Value("int64")}), f"Counting what is left of {name}"
    counted = _mapped(tokenised.select(rows), count, features, key, label)
    return int(counted[-1]["tokens"]) if len(counted) else 0


def _ranges(table: pa.Table, column: str, starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
    """The values `[start, stop)` of each row."""
    lists = table.column(column).combine_chunks()
    values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    return [values[o + start : o + stop] for o, start, stop in zip(offsets[:-1], starts, stops, strict=True)]


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
        # A document that began in an earlier block starts again, after the BOS that is put before it.
        is_first = np.cumsum(values[1:] == 0) == 0
        values = np.concatenate([[before], np.where(is_first, values[1:] - values[0] + before, values[1:])])
        added = np.arange(before)
    else:
        added = np.asarray(front[:before] if column == "input_ids" else [IGNORE_INDEX] * before)
    return np.concatenate([added, values]).astype(np.int32)
