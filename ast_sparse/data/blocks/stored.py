"""Blocks of tokens read from memory-mapped shards: nothing as large as the text is kept in memory.

The documents of a folder are one stream, and some stretches of it are held out. A split is a list of stretches. Its
block i is the tokens `[i · size, (i+1) · size)` of the joined stretches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ast_sparse.data.blocks.held_out import FEW_DOCUMENTS, all_but_the_tail, ceil_share, held_out_order
from ast_sparse.data.tokens.shards import Shard, ShardFolder, open_documents, open_tokens
from ast_sparse.errors import UserError


@dataclass(frozen=True)
class Stretches:
    """The tokens of a split, in order: the number of a shard, and `[start, stop)` in it; int64 `[stretches]` each."""

    shard: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    documents: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all stretches."""
        return int((self.stop - self.start).sum())


def join(parts: Sequence[Stretches]) -> Stretches:
    """The stretches of several folders as those of one split."""
    return Stretches(
        shard=np.concatenate([part.shard for part in parts]),
        start=np.concatenate([part.start for part in parts]),
        stop=np.concatenate([part.stop for part in parts]),
        documents=sum(part.documents for part in parts),
    )


class TokenBlocks(Sequence[dict[str, Any]]):
    """The blocks of a split: rows `{"input_ids": int64 [block_size]}`, read when they are asked for.

    Args:
        folders: their shards are numbered consecutively.
        stretches: from `split_folders`.
        front: tokens at the start of every block; they count towards its size.
    """

    def __init__(
        self, folders: Sequence[ShardFolder], stretches: Stretches, block_size: int, front: tuple[int, ...] = ()
    ) -> None:
        self.folders = list(folders)
        self.stretches = stretches
        self.block_size = block_size
        self.front = front
        self._shards = [(folder, shard) for folder in folders for shard in folder.manifest.shards]
        self._ends = np.cumsum(stretches.stop - stretches.start)
        self._open: dict[int, np.ndarray] = {}

    @property
    def fingerprint(self) -> str:
        """Changes when any block does."""
        digest = hashlib.sha256(repr((self.block_size, *self.front) if self.front else self.block_size).encode())
        for folder in self.folders:
            digest.update(repr([(shard.tokens, shard.tokens_crc32) for shard in folder.manifest.shards]).encode())
        for column in (self.stretches.shard, self.stretches.start, self.stretches.stop):
            digest.update(column.tobytes())
        return digest.hexdigest()[:32]

    @property
    def largest_token(self) -> int:
        """The largest token of the shards, held out or not."""
        return max(*self.front, *(shard.largest_token for _, shard in self._shards), 0)

    def __len__(self) -> int:
        return self.stretches.tokens // (self.block_size - len(self.front))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        filled = len(self.front)
        position = int(index) % len(self) * (self.block_size - filled)  # of the next token, in all stretches joined
        block = np.empty(self.block_size, dtype=np.int64)
        block[:filled] = self.front
        stretch = int(np.searchsorted(self._ends, position, side="right"))
        while filled < self.block_size:
            offset = position - (int(self._ends[stretch - 1]) if stretch else 0)
            start, stop = int(self.stretches.start[stretch]) + offset, int(self.stretches.stop[stretch])
            count = min(stop - start, self.block_size - filled)
            block[filled : filled + count] = self._tokens(int(self.stretches.shard[stretch]))[start : start + count]
            filled, position = filled + count, position + count
            stretch += 1
        return {"input_ids": block}

    def _tokens(self, number: int) -> np.ndarray:
        if number not in self._open:
            folder, shard = self._shards[number]
            self._open[number] = open_tokens(folder.path, folder.manifest, shard)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a memory map would be pickled with all its tokens


def split_folders(folders: Sequence[ShardFolder], share: float, seed: int) -> list[tuple[Stretches, Stretches]]:
    """Which part of each folder is for training and which is held out, by the rule of `training_tokens`.

    Hashes are read shard by shard, so memory grows only with what is held out.

    Raises:
        UserError: a document of a folder with fewer than 20 has a copy somewhere, so the cut would let it leak.
    """
    first = np.cumsum([0, *(len(folder.manifest.shards) for folder in folders)]).tolist()
    if share == 0:
        nothing = np.empty(0, dtype=np.int64)
        empty = Stretches(nothing, nothing, nothing)
        return [(_all(folder, number), empty) for folder, number in zip(folders, first, strict=False)]
    few = [_full_documents(folder) < FEW_DOCUMENTS for folder in folders]
    chosen = [_smallest(folder, share, seed) for folder, is_few in zip(folders, few, strict=True) if not is_few]
    held_out = np.unique(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.uint64)
    _refuse_copies(folders, few)
    return [
        _cut_tail(folder, share, number) if is_few else _without(folder, held_out, number)
        for folder, is_few, number in zip(folders, few, first, strict=False)
    ]


def _full_documents(folder: ShardFolder) -> int:
    return folder.manifest.documents - folder.manifest.empty


def _all(folder: ShardFolder, first: int) -> Stretches:
    shards = folder.manifest.shards
    stops = np.asarray([shard.tokens for shard in shards], dtype=np.int64)
    numbers = np.arange(first, first + len(shards), dtype=np.int64)
    return Stretches(numbers, np.zeros_like(stops), stops, _full_documents(folder))


def _documents(folder: ShardFolder) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
    """Shard by shard: where documents end, int64 with a 0 in front, and the hashes of their texts."""
    for shard in folder.manifest.shards:
        ends, keys = open_documents(folder.path, shard)
        yield shard, np.concatenate([[0], ends.astype(np.int64)]), np.asarray(keys)


def _full_keys(folder: ShardFolder) -> Iterator[np.ndarray]:
    for _, borders, keys in _documents(folder):
        yield keys[np.diff(borders) > 0]


def _smallest(folder: ShardFolder, share: float, seed: int) -> np.ndarray:
    """Hashes of the `ceil(share · n)` documents that come first in the order of holding out, and of their copies."""
    count = ceil_share(share, _full_documents(folder))
    order = np.empty(0, dtype=np.uint64)
    for keys in _full_keys(folder):
        order = np.concatenate([order, held_out_order(keys, seed)])
        order = np.partition(order, count - 1)[:count] if len(order) > count else order
    last = order.max()
    return np.concatenate([keys[held_out_order(keys, seed) <= last] for keys in _full_keys(folder)])


def _without(folder: ShardFolder, held_out: np.ndarray, first: int) -> tuple[Stretches, Stretches]:
    """The stretches for training, and those of the held-out documents."""
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    counts = [0, 0]
    for number, (_, borders, keys) in enumerate(_documents(folder), start=first):
        is_full = np.diff(borders) > 0
        is_out = np.isin(keys, held_out) & is_full
        for which, chosen in enumerate((~is_out & is_full, is_out)):
            parts[which].append(_runs(chosen, borders, number))
            counts[which] += int(np.count_nonzero(chosen))
    (shard, start, stop), out = (np.concatenate(part, axis=1) for part in parts)
    return Stretches(shard, start, stop, counts[0]), Stretches(out[0], out[1], out[2], counts[1])


def _runs(chosen: np.ndarray, borders: np.ndarray, number: int) -> np.ndarray:
    """Neighbouring chosen documents as stretches: `[3, runs]` of shard, start and stop."""
    padded = np.concatenate([[False], chosen, [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)
    return np.stack([np.full(len(edges), number), borders[edges[:, 0]], borders[edges[:, 1]]]).astype(np.int64)


def _cut_tail(folder: ShardFolder, share: float, first: int) -> tuple[Stretches, Stretches]:
    """All but the last `share` of the tokens, and that share; a document that is cut in two counts in both."""
    shards = folder.manifest.shards
    lengths = np.asarray([shard.tokens for shard in shards], dtype=np.int64)
    kept = all_but_the_tail(lengths, share)
    numbers = np.arange(first, first + len(shards), dtype=np.int64)
    counts = [0, 0]
    for (_, borders, _), cut in zip(_documents(folder), kept, strict=True):
        counts[0] += int(np.count_nonzero((np.diff(borders) > 0) & (borders[:-1] < cut)))
        counts[1] += int(np.count_nonzero((np.diff(borders) > 0) & (borders[1:] > cut)))
    return (
        Stretches(numbers, np.zeros_like(kept), kept, counts[0]),
        Stretches(numbers, kept, lengths, counts[1]),
    )


def _refuse_copies(folders: Sequence[ShardFolder], few: Sequence[bool]) -> None:
    own = [np.concatenate(list(_full_keys(folder))) for folder, is_few in zip(folders, few, strict=True) if is_few]
    if not own:
        return
    keys = np.concatenate(own)
    distinct, counts = np.unique(keys, return_counts=True)
    copied = set(distinct[counts > 1].tolist())
    for folder, is_few in zip(folders, few, strict=True):
        if not is_few:
            for others in _full_keys(folder):
                copied.update(others[np.isin(others, distinct)].tolist())
    for folder, is_few in zip(folders, few, strict=True):
        if is_few and copied & {int(key) for keys in _full_keys(folder) for key in keys}:
            raise UserError(
                f"A document of {folder.name} occurs twice in the training text. With fewer than {FEW_DOCUMENTS} "
                "documents the end of the text is held out (`data.eval_share`), and the copy would leak it into "
                "training. Remove the copy, set `data.eval`, or set `data.eval_share: 0`."
            )
