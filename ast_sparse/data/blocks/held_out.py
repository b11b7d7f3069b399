"""Which documents are held out of training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ast_sparse.data.blocks.order import mix
from ast_sparse.errors import UserError

FEW_DOCUMENTS = 20  # with fewer, whole documents are too coarse a unit to hold out


def training_tokens(
    keys: Sequence[np.ndarray], lengths: Sequence[np.ndarray], names: Sequence[str], share: float, seed: int
) -> list[np.ndarray]:
    """How many tokens of each document are for training; the rest of it is held out.

    Whole documents are held out: from each source the `ceil(share · n)` with the smallest hash of (seed, text), so that
    neither the order of files nor copies of a document matter. A copy in another source is treated the same. If a
    source has fewer than 20 documents, the last `share` of its tokens is held out, which cuts one document in two.

    Args:
        keys, lengths: per source `[documents]`, hash of the text, and number of tokens (0 if empty).
        names: names of the sources, for messages.

    Returns:
        Per source `[documents]` int64, between 0 (held out) and the document's length (all for training).

    Raises:
        UserError: a document of a source with fewer than 20 has a copy somewhere, so the cut would let it leak.
    """
    if share == 0:
        return [length.copy() for length in lengths]
    few = [int(np.count_nonzero(length)) < FEW_DOCUMENTS for length in lengths]
    chosen = [
        _smallest(key[length > 0], share, seed)
        for key, length, is_few in zip(keys, lengths, few, strict=True)
        if not is_few
    ]
    held_out = np.unique(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.uint64)
    if any(few):
        _refuse_copies(keys, lengths, names, few)
    return [
        all_but_the_tail(length, share) if is_few else np.where(np.isin(key, held_out), 0, length)
        for key, length, is_few in zip(keys, lengths, few, strict=True)
    ]


def _smallest(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    order = held_out_order(keys, seed)
    count = ceil_share(share, len(keys))
    return keys[order <= np.partition(order, count - 1)[count - 1]]


def held_out_order(keys: np.ndarray, seed: int) -> np.ndarray:
    """Documents are held out in this order, the smallest first: uint64 `[documents]`."""
    return mix(keys ^ mix(np.asarray([seed % 2**64], dtype=np.uint64)))


def ceil_share(share: float, n: int) -> int:
    """`share · n`, rounded up."""
    return min(n, math.ceil(share * n - 1e-9))  # 0.07 · 100 is 7.000000000000001


def all_but_the_tail(lengths: np.ndarray, share: float) -> np.ndarray:
    """How many tokens of each document come before the last `share` of all tokens."""
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    return np.clip(total - ceil_share(share, total) - before, 0, lengths)


def _refuse_copies(
    keys: Sequence[np.ndarray], lengths: Sequence[np.ndarray], names: Sequence[str], few: Sequence[bool]
) -> None:
    present = np.concatenate([key[length > 0] for key, length in zip(keys, lengths, strict=True)])
    distinct, counts = np.unique(present, return_counts=True)
    copied = distinct[counts > 1]
    for key, length, name, is_few in zip(keys, lengths, names, few, strict=True):
        if is_few and np.isin(key[length > 0], copied).any():
            raise UserError(
                f"A document of {name} occurs twice in `data.train`. With fewer than {FEW_DOCUMENTS} documents the "
                "end of the text is held out (`data.eval_share`), and the copy would leak it into training. Remove the "
                "copy, set `data.eval`, or set `data.eval_share: 0`."
            )
