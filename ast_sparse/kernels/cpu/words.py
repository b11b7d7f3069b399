"""The 2:4 code of 16-bit weights (`kernels/code24.py`) by operations on words: a group of four is one 64-bit word.

Results are written to huge pages if Linux grants them: touching new memory costs more than an operation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ast_sparse.kernels.cpu import setting
from ast_sparse.kernels.cpu.pages import ask_for_huge_pages

_BLOCK = 1 << 18  # groups: few calls, and not much larger than the cache
_KEPT = [[place for place in range(4) if occupancy >> place & 1] for occupancy in range(16)]
# Two bits of an int32 for each occupancy: idx0, and idx1 - 1; unless two are kept, an invalid pair: idx0 = 3, idx1 = 1
_FIRST = sum((kept[0] if len(kept) == 2 else 3) << 2 * occupancy for occupancy, kept in enumerate(_KEPT)) - (1 << 32)
_SECOND = sum((kept[1] - 1 if len(kept) == 2 else 0) << 2 * occupancy for occupancy, kept in enumerate(_KEPT))


def take(tensor: Tensor) -> bool:
    """Whether weights, or kept values, are packed and unpacked by words, which pass no gradients."""
    if torch.compiler.is_compiling() or not setting.is_enabled():
        return False
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    fits = plain and tensor.element_size() == 2 and tensor.numel() > 0
    return fits and not passes_gradients(tensor)


def passes_gradients(tensor: Tensor) -> bool:
    """Whether a result has to pass gradients to the tensor; in forward mode, to any tensor."""
    return (tensor.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def pack(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata of a weight; a group that does not keep two gets invalid metadata.

    Args:
        weight: `[out, in]`, 16-bit; mask: bool, of its shape. Both are contiguous, without gradients, and start at a
            whole word of their storage.
    """
    out_features, in_features = weight.shape
    values = ask_for_huge_pages(weight.new_empty(out_features, in_features // 2))
    meta = weight.new_empty(out_features, in_features // 8, dtype=torch.uint8)
    groups, kept = weight.view(torch.int64).view(-1), mask.view(torch.int32).view(-1)
    pairs, codes = values.view(torch.int32).view(-1), meta.view(-1)
    tables = [torch.tensor(table, dtype=torch.int32, device="cpu") for table in (_FIRST, _SECOND)]
    dtypes = (torch.int32, torch.int32, torch.int32, torch.int64, torch.uint8, torch.uint8)
    for at, (occupancy, first, second, moved, idx0, idx1) in _blocks(len(groups), *dtypes):
        # the four bytes of a group's mask become four neighbouring bits: twice the occupancy
        torch.mul(kept[at], 0x01020408, out=occupancy).bitwise_right_shift_(23)
        for idx, table in zip((idx0, idx1), tables, strict=True):  # the second table has idx1 - 1
            idx.copy_(torch.bitwise_right_shift(table, occupancy, out=first))
            idx.bitwise_and_(3)
        nibbles = ((idx1 + 1) << 2).bitwise_or_(idx0).view(torch.int16)
        codes[at.start // 2 : at.stop // 2].copy_(nibbles.bitwise_or_(nibbles >> 4))
        for idx, entry in ((idx0, first), (idx1, second)):  # 16 bits per place; the second one moves one place less
            moved.copy_(idx.bitwise_left_shift_(4))
            entry.copy_(torch.bitwise_right_shift(groups[at], moved, out=moved))
        torch.bitwise_or(first.bitwise_and_(0xFFFF), second.bitwise_and_(-0x10000), out=pairs[at])
    return values, meta


def unpack(values: Tensor, meta: Tensor) -> Tensor:
    """The dense weight `[out, in]`.

    Args:
        values: `[out, in/2]`, as the weight in `pack`; meta: `[out, in/8]`, uint8, in any layout.
    """
    dense = ask_for_huge_pages(values.new_empty(values.shape[0], 2 * values.shape[1]))
    groups, pairs, codes = dense.view(torch.int64).view(-1), values.view(torch.uint32).view(-1), meta.flatten()
    for at, (first, second, move, nibbles) in _blocks(len(groups), torch.int64, torch.int64, torch.int64, torch.uint8):
        torch.bitwise_and(second.copy_(pairs[at]), 0xFFFF, out=first)
        second.bitwise_xor_(first)
        # a byte with two nibbles becomes two bytes, each with the four bits that say how far an entry moves
        two = nibbles.view(torch.int16).copy_(codes[at.start // 2 : at.stop // 2])
        two.bitwise_or_(two << 4)
        first.bitwise_left_shift_(move.copy_((two & 0x0303).bitwise_left_shift_(4).view(torch.uint8)))
        two.bitwise_left_shift_(2).bitwise_and_(0x3030).sub_(0x1010)  # the second one is already one place further
        second.bitwise_left_shift_(move.copy_(nibbles))
        torch.bitwise_or(first, second, out=groups[at])
    return dense


def _blocks(groups: int, *dtypes: torch.dtype) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks of this many groups, each with buffers of its length in each dtype; all blocks share the buffers."""
    size = min(groups, _BLOCK)
    buffers = [torch.empty(size, dtype=dtype, device="cpu") for dtype in dtypes]
    for start in range(0, groups, size):
        block = slice(start, min(start + size, groups))
        yield block, [buffer[: block.stop - start] for buffer in buffers]
