"""The 2:4 code: kept values in order, and a nibble of positions for every group of four.

A nibble is `idx0 | idx1 << 2` with `idx0 < idx1`; the even group of a pair lies in the low half of its byte. Two bytes,
read as a little-endian int16, are CUTLASS's metadata before its reordering.
"""

import sys

import torch
from torch import Tensor

_GROUP = 4
_KEPT = 2
_ROWS = 64  # a block whose temporaries stay in the cache
# By occupancy (bit b: position b is kept) the nibble; only six of sixteen occupancies keep two.
_NIBBLE_OF = {0b0011: 4, 0b0101: 8, 0b0110: 9, 0b1001: 12, 0b1010: 13, 0b1100: 14}
_NIBBLES = sum(nibble << 4 * occupancy for occupancy, nibble in _NIBBLE_OF.items())  # the same table in an integer


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
    out_features, in_features = weight.shape
    values = weight.new_empty(out_features, in_features // 2)
    meta = torch.empty(out_features, in_features // 8, dtype=torch.uint8, device=weight.device)
    words = _fills_words(weight) and not (weight.requires_grad and torch.is_grad_enabled())
    for rows in _row_blocks(weight):
        kept = _mask_of(weight[rows]) if mask is None else mask[rows]
        pack = _pack_words if words else _pack_rows
        values[rows], meta[rows] = pack(weight[rows], kept)
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
    if _fills_words(values) and not (values.requires_grad and torch.is_grad_enabled()):
        dense = values.new_empty(values.shape[0], 2 * values.shape[1])
        for rows in _row_blocks(values):
            dense[rows] = _unpack_words(values[rows], meta[rows])
        return dense
    blocks = [_unpack_rows(values[rows], meta[rows]) for rows in _row_blocks(values)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def check_meta(meta: Tensor) -> bool:
    """Whether every nibble of the metadata (uint8) names two different positions in order."""
    valid = torch.zeros(16, dtype=torch.bool, device=meta.device)
    valid[list(_NIBBLE_OF.values())] = True
    return all(
        bool((valid[(block & 15).int()] & valid[(block >> 4).int()]).all())
        for block in (meta[rows] for rows in _row_blocks(meta))
    )


def coded_bytes(numel: int, itemsize: int) -> int:
    """Bytes of the code of a weight with `numel` entries of `itemsize` bytes."""
    return numel * _KEPT // _GROUP * itemsize + numel // (2 * _GROUP)


def _row_blocks(tensor: Tensor) -> list[slice]:
    rows = tensor.shape[0]
    step = _ROWS if tensor.device.type == "cpu" else max(rows, 1)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


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


def _fills_words(tensor: Tensor) -> bool:
    """Whether a group is one 64-bit word on this little-endian CPU: all its entries are moved by one shift."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return plain and tensor.element_size() == 2 and tensor.numel() > 0 and sys.byteorder == "little"


def _whole(tensor: Tensor) -> Tensor:
    """The tensor, copied unless it can be viewed as words of a group."""
    starts_whole = tensor.is_contiguous() and tensor.storage_offset() % _GROUP == 0
    return tensor.detach() if starts_whole else tensor.detach().clone(memory_format=torch.contiguous_format)


def _pack_words(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`_pack_rows` of 16-bit weights."""
    # the four bytes of a group's mask become four neighbouring bits
    occupancy = (_whole(mask).view(torch.int32) * 0x01020408 >> 24).bitwise_and_(15).long()
    nibbles = torch.tensor(_NIBBLES) >> occupancy.mul_(4) & 15
    if not bool(nibbles.all()):
        raise ValueError("The mask does not keep exactly two of each four columns.")
    groups = _whole(weight).view(torch.int64)
    pairs = (groups >> (nibbles & 3).mul_(16)).bitwise_and_(0xFFFF)
    pairs |= (groups >> (nibbles >> 2).mul_(16)).bitwise_and_(0xFFFF).mul_(1 << 16)
    bytes_ = nibbles.to(torch.uint8).unflatten(1, (-1, 2))
    return pairs.int().view(weight.dtype), bytes_[..., 0] | bytes_[..., 1] << 4


def _unpack_words(values: Tensor, meta: Tensor) -> Tensor:
    """`_unpack_rows` of 16-bit values."""
    pairs = _whole(values).view(torch.int32).long()
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).flatten(1).long()
    first = (pairs & 0xFFFF).bitwise_left_shift_((nibbles & 3).mul_(16))
    second = (pairs >> 16).bitwise_and_(0xFFFF).bitwise_left_shift_((nibbles >> 2).mul_(16))
    return first.bitwise_or_(second).view(values.dtype)


def _unpack_rows(values: Tensor, meta: Tensor) -> Tensor:
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).flatten(1)
    positions = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    pairs = values.unflatten(1, (-1, _KEPT))
    dense = values.new_zeros(*pairs.shape[:-1], _GROUP).scatter(-1, positions, pairs)
    return dense.flatten(1)
