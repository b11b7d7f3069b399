"""The 2:4 code: kept values in order, and a nibble of positions for every group of four.

A nibble is `idx0 | idx1 << 2` with `idx0 < idx1`; the even group of a pair lies in the low half of its byte. Two bytes,
read as a little-endian int16, are CUTLASS's metadata before its reordering.
"""

import torch
from torch import Tensor

_GROUP = 4
_KEPT = 2
_ROWS = 64  # a block whose temporaries stay in the cache
# By occupancy (bit b: position b is kept) the nibble; only six of sixteen occupancies keep two.
_NIBBLE_OF = {0b0011: 4, 0b0101: 8, 0b0110: 9, 0b1001: 12, 0b1010: 13, 0b1100: 14}


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
    for rows in _row_blocks(weight):
        kept = _mask_of(weight[rows]) if mask is None else mask[rows]
        values[rows], meta[rows] = _pack_rows(weight[rows], kept)
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


def _unpack_rows(values: Tensor, meta: Tensor) -> Tensor:
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).flatten(1)
    positions = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    pairs = values.unflatten(1, (-1, _KEPT))
    dense = values.new_zeros(*pairs.shape[:-1], _GROUP).scatter(-1, positions, pairs)
    return dense.flatten(1)
