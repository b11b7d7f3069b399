"""The order of blocks: a permutation for each epoch, computed block by block and never stored."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 4


def mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: uint64 to uint64, one to one, every bit depending on every other."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def seed_key(*parts: object) -> int:
    """A 64-bit key made from a seed and names, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


class BlockOrder:
    """The order in which the blocks of a text are trained on: each once an epoch, every epoch in its own order.

    The permutation is a Feistel network of four rounds over the next power of four, walked until it hits a block
    (cycle walking), so nothing as large as the text is kept, and any position is computed directly.

    Args:
        blocks: their number, at least 1.
        key: from `seed_key`; each key has its own order.
    """

    def __init__(self, blocks: int, key: int) -> None:
        self.blocks = blocks
        self._key = np.uint64(key)
        self._half = np.uint64(max(1, -(-(blocks - 1).bit_length() // 2)))  # bits of each half
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The blocks at positions 0, 1, ... of an endless pass over the text: int64 `[n]` to int64 `[n]`."""
        epochs, places = np.divmod(positions.astype(np.uint64), np.uint64(self.blocks))
        keys = mix(mix(epochs) ^ self._key)
        found = self._permute(places, keys)
        outside = np.flatnonzero(found >= self.blocks)
        while len(outside):
            found[outside] = self._permute(found[outside], keys[outside])
            outside = outside[found[outside] >= self.blocks]
        return found.astype(np.int64)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(keys ^ mix(right + np.uint64(number << 32))) & self._mask)
        return (left << self._half) | right
