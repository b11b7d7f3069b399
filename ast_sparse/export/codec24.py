"""The 2:4 code: kept values in order, and a nibble of positions for every group of four.

A nibble is `idx0 | idx1 << 2` with `idx0 < idx1`; the even group of a pair lies in the low half of its byte. Two bytes,
read as a little-endian int16, are CUTLASS's metadata before its reordering.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from ast_sparse.export.codec import Codec
from ast_sparse.sparsity.masks import Pattern

_GROUP = 4
_KEPT = 2
_BLOCK = 1 << 19  # entries of a block of `_pack_rows` and `_unpack_rows`, whose temporaries stay in the cache
_WORDS = 1 << 18  # groups of a block of the word path: few calls, and not too far out of the cache
_CHECKED = 1 << 16  # words of metadata, the same
# By occupancy (bit b: position b is kept) the nibble; only six of sixteen occupancies keep two.
_NIBBLE_OF = {0b0011: 4, 0b0101: 8, 0b0110: 9, 0b1001: 12, 0b1010: 13, 0b1100: 14}
# The same as tables of two bits in an int32, of idx0 and of idx1 - 1; what is no nibble gets idx0 = 3, idx1 = 1
_FIRST = sum((_NIBBLE_OF.get(occupancy, 3) & 3) << 2 * occupancy for occupancy in range(16)) - (1 << 32)
_SECOND = sum((_NIBBLE_OF.get(occupancy, 4) // 4 - 1) << 2 * occupancy for occupancy in range(16))
_HUGE = 1 << 22  # bytes of a tensor for which huge pages are asked for


def pack24(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Code a 2:4 weight.

    Args:
        weight: `[out, in]`, any dtype, `in` a multiple of 8.
        mask: bool, shape of the weight, True = kept, exactly two of each four columns; a kept zero stays kept.
            None: the non-zeros, and zeros behind them where a group has fewer than two.

    Returns:
        values `[out, in/2]`, dtype of the weight; meta `[out, in/8]`, uint8.

    Raises:
        ValueError: wrong shape, or a group that does not keep exactly two (without mask: more than two).
    """
    if weight.dim() != 2 or weight.shape[1] % (2 * _GROUP):
        raise ValueError(f"A weight of shape {tuple(weight.shape)} has no 2:4 code: [out, in], in a multiple of 8.")
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(f"The mask is {mask.dtype} {tuple(mask.shape)}, the weight {tuple(weight.shape)}.")
    if mask is None:
        mask = _joined([_mask_of(weight[rows]) for rows in _row_blocks(weight)])
    if _fills_words(weight):
        values, meta = _pack_words(weight, mask)
    else:
        blocks = [_pack_rows(weight[rows], mask[rows]) for rows in _row_blocks(weight)]
        values, meta = (_joined(parts) for parts in zip(*blocks, strict=True))
    return values, meta


def unpack24(values: Tensor, meta: Tensor) -> Tensor:
    """The dense weight `[out, in]` of a code, pruned entries exactly 0.0; differentiable with respect to the values.

    Args:
        values: `[out, in/2]`, any dtype, `in` a multiple of 8.
        meta: `[out, in/8]`, uint8; whether its nibbles are valid is what `check_meta` tells.

    Raises:
        ValueError: the shapes do not fit together, or meta is not uint8.
    """
    fits = values.dim() == 2 and values.shape[1] % _GROUP == 0
    if not fits or meta.shape != (values.shape[0], values.shape[1] // _GROUP) or meta.dtype != torch.uint8:
        raise ValueError(
            f"Metadata {meta.dtype} {tuple(meta.shape)} does not fit values {tuple(values.shape)}: "
            "uint8 [out, in/8] and [out, in/2] are needed."
        )
    if _fills_words(values):
        return _unpack_words(values, meta)
    return _joined([_unpack_rows(values[rows], meta[rows]) for rows in _row_blocks(values)])


def check_meta(meta: Tensor) -> bool:
    """Whether every nibble of the metadata (uint8) names two different positions in order."""
    flat = _whole(meta, 8).view(-1)
    ends = len(flat) - len(flat) % 8
    # eight bytes at a time: 4 + idx1 - idx0 - 1 never borrows from its neighbours, and has the 4 where idx0 < idx1
    for part, scale in ((flat[:ends].view(torch.int64), 0x0101010101010101), (flat[ends:].int(), 1)):
        for words in part.split(_CHECKED):
            order = ((words >> 2) & 0x33 * scale) + 0x44 * scale - (words & 0x33 * scale) - 0x11 * scale
            if not bool((order.bitwise_and_(0x44 * scale) == 0x44 * scale).all()):
                return False
    return True


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two CPU tensors have the same shape, dtype and bits: 0.0 and -0.0 differ, a NaN equals its copy."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    bytes_ = [_whole(each, 8).reshape(-1).view(torch.uint8) for each in (first, second)]
    ends = first.nbytes - first.nbytes % 8
    words = [each[:ends].view(torch.int64) for each in bytes_]  # `torch.equal` takes as long for an entry of any size
    return torch.equal(*words) and torch.equal(*(each[ends:] for each in bytes_))


def _row_blocks(tensor: Tensor) -> list[slice]:
    rows, columns = tensor.shape
    step = max(_BLOCK // max(columns, 1), 1) if tensor.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def _mask_of(weight: Tensor) -> Tensor:
    """Two of each four: the non-zeros, then the last zeros (CUTLASS's choice for an empty group)."""
    groups = (weight != 0).unflatten(1, (-1, _GROUP))
    if bool((groups.sum(-1) > _KEPT).any()):
        count = int((groups.sum(-1) > _KEPT).sum())
        raise ValueError(f"The weight is not 2:4: {count} groups of four hold more than two non-zeros.")
    rank = groups.to(torch.int8) * _GROUP + torch.arange(_GROUP, dtype=torch.int8, device=weight.device)
    chosen = rank.topk(_KEPT, dim=-1).indices
    return torch.zeros_like(groups).scatter_(-1, chosen, True).flatten(1)


def _pack_rows(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    groups = mask.unflatten(1, (-1, _GROUP)).to(torch.uint8)
    if not bool((groups.sum(-1) == _KEPT).all()):
        raise ValueError("The mask does not keep exactly two of each four columns.")
    nibble_of = torch.zeros(16, dtype=torch.uint8, device=weight.device)
    nibble_of[list(_NIBBLE_OF)] = torch.tensor(list(_NIBBLE_OF.values()), dtype=torch.uint8, device=weight.device)
    occupancy = groups[..., 0] | groups[..., 1] << 1 | groups[..., 2] << 2 | groups[..., 3] << 3
    nibbles = nibble_of[occupancy.int()].unflatten(1, (-1, 2))
    return weight[mask].view(weight.shape[0], -1), nibbles[..., 0] | nibbles[..., 1] << 4


def _unpack_rows(values: Tensor, meta: Tensor) -> Tensor:
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).flatten(1)
    positions = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    pairs = values.unflatten(1, (-1, _KEPT))
    dense = values.new_zeros(*pairs.shape[:-1], _GROUP).scatter(-1, positions, pairs)
    return dense.flatten(1)


def _fills_words(tensor: Tensor) -> bool:
    """Whether a group is one 64-bit word on this little-endian CPU: all its entries are moved by one shift."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    fits = plain and tensor.element_size() == 2 and tensor.numel() > 0 and sys.byteorder == "little"
    return fits and not (tensor.requires_grad and torch.is_grad_enabled()) and not torch.compiler.is_compiling()


def _whole(tensor: Tensor, entries: int = _GROUP) -> Tensor:
    """The tensor, copied unless it can be viewed as words of so many entries."""
    starts_whole = tensor.is_contiguous() and tensor.storage_offset() % entries == 0
    return tensor.detach() if starts_whole else tensor.detach().clone(memory_format=torch.contiguous_format)


def _word_blocks(words: int, *dtypes: torch.dtype) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of so many words, each with buffers of a word's length in each dtype, the same ones for all blocks."""
    size = min(words, _WORDS)
    buffers = [torch.empty(size, dtype=dtype, device="cpu") for dtype in dtypes]
    for start in range(0, words, size):
        block = slice(start, min(start + size, words))
        yield block, [buffer[: block.stop - start] for buffer in buffers]


def _pack_words(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`_pack_rows` of 16-bit weights, in buffers but for bytes: touching fresh memory costs more than an operation."""
    out_features, in_features = weight.shape
    values = _in_huge_pages(weight.new_empty(out_features, in_features // 2))
    meta = weight.new_empty(out_features, in_features // 8, dtype=torch.uint8)
    groups, kept = _whole(weight).view(torch.int64).view(-1), _whole(mask).view(torch.int32).view(-1)
    pairs, codes = values.view(torch.int32).view(-1), meta.view(-1)
    tables = [torch.tensor(table, dtype=torch.int32, device="cpu") for table in (_FIRST, _SECOND)]
    dtypes = (torch.int32, torch.int32, torch.int32, torch.int64, torch.uint8, torch.uint8)
    for at, (occupancy, first, second, moved, idx0, idx1) in _word_blocks(len(groups), *dtypes):
        # the four bytes of a group's mask become four neighbouring bits: two times the occupancy
        torch.mul(kept[at], 0x01020408, out=occupancy).bitwise_right_shift_(23)
        for idx, table in zip((idx0, idx1), tables, strict=True):  # of the second one less
            idx.copy_(torch.bitwise_right_shift(table, occupancy, out=first))
            idx.bitwise_and_(3)
        nibbles = ((idx1 + 1) << 2).bitwise_or_(idx0).view(torch.int16)
        codes[at.start // 2 : at.stop // 2].copy_(nibbles.bitwise_or_(nibbles >> 4))
        for idx, entry in ((idx0, first), (idx1, second)):  # 16 bits a place; the second one has one place less to go
            moved.copy_(idx.bitwise_left_shift_(4))
            entry.copy_(torch.bitwise_right_shift(groups[at], moved, out=moved))
        torch.bitwise_or(first.bitwise_and_(0xFFFF), second.bitwise_and_(-0x10000), out=pairs[at])
    if not check_meta(meta):
        raise ValueError("The mask does not keep exactly two of each four columns.")
    return values, meta


def _unpack_words(values: Tensor, meta: Tensor) -> Tensor:
    """`_unpack_rows` of 16-bit values, written as `_pack_words` is."""
    dense = _in_huge_pages(values.new_empty(values.shape[0], 2 * values.shape[1]))
    groups, pairs, codes = dense.view(torch.int64).view(-1), _whole(values).view(torch.uint32).view(-1), meta.flatten()
    for at, (first, second, move, nibbles) in _word_blocks(
        len(groups), torch.int64, torch.int64, torch.int64, torch.uint8
    ):
        torch.bitwise_and(second.copy_(pairs[at]), 0xFFFF, out=first)
        second.bitwise_xor_(first)
        # a byte with two nibbles becomes two bytes with a nibble, each then four bits of how far an entry moves
        two = nibbles.view(torch.int16).copy_(codes[at.start // 2 : at.stop // 2])
        two.bitwise_or_(two << 4)
        first.bitwise_left_shift_(move.copy_((two & 0x0303).bitwise_left_shift_(4).view(torch.uint8)))
        two.bitwise_left_shift_(2).bitwise_and_(0x3030).sub_(0x1010)  # the second one lies one place further already
        second.bitwise_left_shift_(move.copy_(nibbles))
        torch.bitwise_or(first, second, out=groups[at])
    return dense


def _in_huge_pages(tensor: Tensor) -> Tensor:
    """The new tensor, a large one in huge pages where Linux has them: touching it first is most of a copy."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    whole_pages = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = _madvise()
    if tensor.nbytes >= _HUGE and advise is not None:
        advise(start, whole_pages, mmap.MADV_HUGEPAGE)  # a wish: where it is not granted nothing is lost
    return tensor


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    if advise is not None:
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


CODE24 = Codec(
    method="ast_sparse_24",
    format_version=1,
    pattern=Pattern(_KEPT, _GROUP),
    multiple=2 * _GROUP,
    columns_per_byte=2 * _GROUP,
    encode=pack24,
    decode=unpack24,
    check_meta=check_meta,
)
