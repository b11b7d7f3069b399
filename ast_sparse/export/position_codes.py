"""Codes for the positions of n:2n masks: which n of each group of 2n weights are kept (paper Sec. 6.1)."""

import heapq
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LARGEST_HALF = 32  # the ranks of wider patterns do not fit int64

_BLOCK = 256  # symbols of a Huffman stream that are decoded one after another; blocks are decoded in parallel

_Ints = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]


def pattern_rank(groups: Tensor, n: int) -> Tensor:
    """Number the patterns in the combinatorial number system: `Σ C(c_i, i)` over the kept columns `c_1 < … < c_n`.

    Args:
        groups: bool `[..., m]`, True = kept, exactly `n` of them in each group.

    Returns:
        int64 `[...]`, from 0 to `C(m, n) - 1`; patterns are ordered by their last kept column, then the one before it.

    Raises:
        ValueError: the groups are not bool, the pattern is not `0 < n < m`, its ranks do not fit int64, or a group
            does not keep exactly `n`.
    """
    m = groups.shape[-1] if groups.dim() else 0
    binomials = _binomials(n, m).to(groups.device)
    if groups.dtype != torch.bool:
        raise ValueError(f"The groups are {groups.dtype}, not bool.")
    rank = torch.zeros(groups.shape[:-1], dtype=torch.int64, device=groups.device)
    seen = torch.zeros_like(rank)
    for column in range(m):
        kept = groups[..., column]
        seen += kept
        rank += binomials[column][seen] * kept
    if bool((seen != n).any()):
        raise ValueError(f"{int((seen != n).sum()):,} of {seen.numel():,} groups of {m} do not keep exactly {n}.")
    return rank


def pattern_unrank(rank: Tensor, n: int, m: int) -> Tensor:
    """The pattern of a number: inverse of `pattern_rank`.

    Args:
        rank: int64 `[...]`, from 0 to `C(m, n) - 1`.

    Returns:
        bool `[..., m]`, exactly `n` True in each group.

    Raises:
        ValueError: a rank is not int64 or out of range, the pattern is not `0 < n < m`, or its ranks do not fit int64.
    """
    binomials = _binomials(n, m).to(rank.device)
    if rank.dtype != torch.int64 or bool(((rank < 0) | (rank >= math.comb(m, n))).any()):
        raise ValueError(f"Ranks of {n}:{m} patterns are int64 from 0 to {math.comb(m, n) - 1}.")
    groups = torch.empty(*rank.shape, m, dtype=torch.bool, device=rank.device)
    left = torch.full_like(rank, n)
    for column in reversed(range(m)):
        smallest = binomials[column][left]  # the lowest rank with this column as the last one kept
        kept = rank >= smallest
        groups[..., column] = kept
        rank = rank - smallest * kept
        left -= kept.long()
    return groups


def _binomials(n: int, m: int) -> Tensor:
    """`C(column, k)` as int64 `[m, m + 1]`."""
    if not 0 < n < m or m > 2 * LARGEST_HALF:
        raise ValueError(f"Pattern {n}:{m} cannot be ranked: 0 < N < M <= {2 * LARGEST_HALF} is needed.")
    return torch.tensor([[math.comb(column, k) for k in range(m + 1)] for column in range(m)])


def encode_fixed(values: _Ints, width: int) -> _Bytes:
    """Write integers `[count]` of `width` bits each, most significant bit first, as bytes without gaps."""
    bits = np.empty((values.size, width), dtype=np.uint8)
    for i in range(width):
        bits[:, i] = (values >> (width - 1 - i)) & 1
    return np.packbits(bits)


def decode_fixed(stream: _Bytes, width: int, count: int) -> _Ints:
    """Read what `encode_fixed` wrote."""
    bits = np.unpackbits(stream, count=width * count).reshape(count, width)
    values = np.zeros(count, dtype=np.int64)
    for i in range(width):
        values = (values << 1) | bits[:, i]
    return values


def huffman_lengths(counts: _Ints) -> _Ints:
    """Word lengths of an optimal prefix code (Huffman 1952).

    Args:
        counts: `[symbols]`, how often each occurs.

    Returns:
        `[symbols]`: bits of each word. 0 for a symbol that does not occur, and for one that occurs alone.
    """
    heap = [(int(counts[symbol]), int(symbol)) for symbol in np.flatnonzero(counts)]
    heapq.heapify(heap)
    parent: dict[int, int] = {}
    for node in range(counts.size, counts.size + len(heap) - 1):
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        parent[first[1]] = parent[second[1]] = node
        heapq.heappush(heap, (first[0] + second[0], node))
    depth: dict[int, int] = {}
    for node in sorted(parent, reverse=True):  # a parent's number is higher than its children's
        depth[node] = depth.get(parent[node], 0) + 1
    return np.array([depth.get(symbol, 0) for symbol in range(counts.size)], dtype=np.int64)


class HuffmanCode:
    """A canonical Huffman code: words of the same length are consecutive numbers, shorter words come first.

    Args:
        counts: int64 `[symbols]`, not all 0. Lengths stay below 60 bits up to 10^12 occurrences.

    Attributes:
        lengths: bits of the word of each symbol.
    """

    def __init__(self, counts: _Ints) -> None:
        self.lengths = huffman_lengths(counts)
        occurring = np.flatnonzero(counts)
        self._order = occurring[np.argsort(self.lengths[occurring], kind="stable")]
        self._longest = int(self.lengths.max())
        sorted_lengths = self.lengths[self._order]
        shares = np.left_shift(1, self._longest - sorted_lengths)  # of all words of the longest length
        starts = np.cumsum(shares) - shares
        self._words = np.zeros_like(self.lengths)
        self._words[self._order] = starts >> (self._longest - sorted_lengths)
        self._lengths, self._first = np.unique(sorted_lengths, return_index=True)
        self._starts = starts[self._first]

    def encode(self, symbols: _Ints) -> tuple[_Bytes, _Ints]:
        """Bytes without gaps, and the bit at which each block of 256 symbols starts; the last entry is the end."""
        lengths, words = self.lengths[symbols], self._words[symbols]
        ends = np.cumsum(lengths)
        bits = np.zeros(int(ends[-1]), dtype=np.uint8)
        for back in range(self._longest):  # from the last bit of each word
            long = lengths > back
            bits[ends[long] - 1 - back] = (words[long] >> back) & 1
        return np.packbits(bits), np.append((ends - lengths)[::_BLOCK], ends[-1])

    def decode(self, stream: _Bytes, starts: _Ints, count: int) -> _Ints:
        """Read `count` symbols that `encode` wrote, all blocks in parallel."""
        bits = np.append(np.unpackbits(stream), np.zeros(self._longest, dtype=np.uint8))
        places = np.arange(self._longest)
        weights = np.left_shift(1, places[::-1])
        at, last = starts[:-1].copy(), bits.size - self._longest
        symbols = np.empty((at.size, _BLOCK), dtype=np.int64)
        for i in range(_BLOCK):
            window = bits[at[:, None] + places] @ weights
            kind = np.searchsorted(self._starts, window, side="right") - 1
            lengths = self._lengths[kind]
            past = (window - self._starts[kind]) >> (self._longest - lengths)  # words of this length before it
            symbols[:, i] = self._order[self._first[kind] + past]
            at = np.minimum(at + lengths, last)  # the last block reads on past its end
        return symbols.reshape(-1)[:count]


def fixed_bits(n: int) -> dict[str, int]:
    """Position bits of a group of n:2n by the fixed-length codes (paper Sec. 6.1: combinatorial)."""
    m = 2 * n
    return {"bitmask": m, "index": n * (m - 1).bit_length(), "combinatorial": (math.comb(m, n) - 1).bit_length()}


def uniform_huffman_bits(n: int) -> float:
    """Mean word length of the Huffman code of `C(2n, n)` equally frequent patterns: words of two lengths."""
    patterns = math.comb(2 * n, n)
    shorter = patterns.bit_length() - 1
    return shorter + 2 * (patterns - 2**shorter) / patterns


def closed_bound(n: int) -> float:
    """`2n - log2 √(πn)`, above `log2 C(2n, n)` by less than `1/(5n)` (paper Sec. 6.1)."""
    return 2 * n - math.log2(math.pi * n) / 2
