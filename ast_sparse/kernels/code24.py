"""The 2:4 code: kept values in order, and a nibble of positions for every group of four.

A nibble is `idx0 | idx1 << 2` with `idx0 < idx1`; the even group of a pair is in the low half of its byte. Two bytes
read as a little-endian int16 are CUTLASS's metadata before it is reordered.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ast_sparse.kernels.cpu import words

_GROUP = 4
_KEPT = 2
_BLOCK = 1 << 19  # entries of a block of `_pack_rows` and `_unpack_rows`, whose temporaries stay in the cache
_CHECKED = 1 << 16  # groups of eight bytes of metadata in a block of `check_meta`
# The nibble by occupancy (bit b: position b is kept); only six of the sixteen occupancies keep two.
_NIBBLE_OF = {0b0011: 4, 0b0101: 8, 0b0110: 9, 0b1001: 12, 0b1010: 13, 0b1100: 14}
_NOT_TWO = "The mask does not keep exactly two of each four columns."


def pack24(weight: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode a 2:4 weight.

    Args:
        weight: `[out, in]`, any dtype, `in` a multiple of 8.
        mask: bool, shape of the weight, True = kept, exactly two of each four columns; a kept zero stays kept.
            None: the non-zeros are kept, and the last zeros of a group that has fewer than two.

    Returns:
        values `[out, in/2]`, dtype of the weight; meta `[out, in/8]`, uint8.

    Raises:
        ValueError: wrong shape, or a group that does not keep exactly two (without mask: more than two).
    """
    if weight.dim() != 2 or weight.shape[1] % (2 * _GROUP):
        raise ValueError(
            f"The 2:4 code needs a weight [out, in], in a multiple of 8, not one of shape {tuple(weight.shape)}."
        )
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(f"The mask is {mask.dtype} {tuple(mask.shape)}, the weight {tuple(weight.shape)}.")
    if mask is None:
        mask = _joined([_mask_of(weight[rows]) for rows in _row_blocks(weight)])
    if words.take(weight):
        values, meta = words.pack(_whole(weight), _whole(mask))
        if not check_meta(meta):
            raise ValueError(_NOT_TWO)
    else:
        blocks = [_pack_rows(weight[rows], mask[rows]) for rows in _row_blocks(weight)]
        values, meta = (_joined(parts) for parts in zip(*blocks, strict=True))
    return values, meta


def unpack24(values: Tensor, meta: Tensor) -> Tensor:
    """Decode to the weight `[out, in]`, pruned entries exactly 0.0; differentiable with respect to the values.

    Args:
        values: `[out, in/2]`, any dtype, `in` a multiple of 8.
        meta: `[out, in/8]`, uint8; its nibbles are not checked, see `check_meta`.

    Raises:
        ValueError: the shapes do not fit together, or meta is not uint8.
    """
    fits = values.dim() == 2 and values.shape[1] % _GROUP == 0
    if not fits or meta.shape != (values.shape[0], values.shape[1] // _GROUP) or meta.dtype != torch.uint8:
        raise ValueError(
            f"Metadata {meta.dtype} {tuple(meta.shape)} does not fit values {tuple(values.shape)}: "
            "uint8 [out, in/8] and [out, in/2] are needed."
        )
    if words.take(values):
        return words.unpack(_whole(values), meta)
    return _joined([_unpack_rows(values[rows], meta[rows]) for rows in _row_blocks(values)])


def check_meta(meta: Tensor) -> bool:
    """Whether every nibble of the metadata (uint8) names two different positions in order."""
    flat = _whole(meta, 8).view(-1)
    ends = len(flat) - len(flat) % 8
    # eight bytes at a time: 4 + idx1 - idx0 - 1 never borrows from a neighbour, and its bit 4 is set if idx0 < idx1
    for part, scale in ((flat[:ends].view(torch.int64), 0x0101010101010101), (flat[ends:].int(), 1)):
        for block in part.split(_CHECKED):
            order = ((block >> 2) & 0x33 * scale) + 0x44 * scale - (block & 0x33 * scale) - 0x11 * scale
            if not bool((order.bitwise_and_(0x44 * scale) == 0x44 * scale).all()):
                return False
    return True


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two CPU tensors have the same shape, dtype and bits: 0.0 and -0.0 differ, a NaN equals its copy."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    bytes_ = [_whole(each, 8).reshape(-1).view(torch.uint8) for each in (first, second)]
    ends = first.nbytes - first.nbytes % 8
    wide = [each[:ends].view(torch.int64) for each in bytes_]  # `torch.equal` takes as long per entry for any dtype
    return torch.equal(*wide) and torch.equal(*(each[ends:] for each in bytes_))


def _row_blocks(tensor: Tensor) -> list[slice]:
    rows, columns = tensor.shape
    step = max(_BLOCK // max(columns, 1), 1) if tensor.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def _mask_of(weight: Tensor) -> Tensor:
    """Keep two of each four: the non-zeros, then the last zeros (CUTLASS's choice for an empty group)."""
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
        raise ValueError(_NOT_TWO)
    nibble_of = torch.zeros(16, dtype=torch.uint8, device=weight.device)
    nibble_of[list(_NIBBLE_OF)] = torch.tensor(list(_NIBBLE_OF.values()), dtype=torch.uint8, device=weight.device)
    occupancy = groups[..., 0] | groups[..., 1] << 1 | groups[..., 2] << 2 | groups[..., 3] << 3
    nibbles = nibble_of[occupancy.int()].unflatten(1, (-1, 2))
    return weight[mask].view(weight.shape[0], -1), nibbles[..., 0] | nibbles[..., 1] << 4


def _unpack_rows(values: Tensor, meta: Tensor) -> Tensor:
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).flatten(1)
    positions = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    as_bits = values.element_size() == 2 and not words.passes_gradients(values)
    pairs = (values.view(torch.int16) if as_bits else values).unflatten(1, (-1, _KEPT))  # keeps the bits of a NaN
    dense = pairs.new_zeros(*pairs.shape[:-1], _GROUP).scatter(-1, positions, pairs).flatten(1)
    return dense.view(values.dtype) if as_bits else dense


def _whole(tensor: Tensor, entries: int = _GROUP) -> Tensor:
    """The tensor, copied unless it can be viewed as words of that many entries."""
    starts_whole = tensor.is_contiguous() and tensor.storage_offset() % entries == 0
    return tensor.detach() if starts_whole else tensor.detach().clone(memory_format=torch.contiguous_format)
