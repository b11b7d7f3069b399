"""Products of many tokens: W decoded into a workspace, or PyTorch's semi-structured products.

They start from the values and metadata of the 2:4 code in every call, so that nothing is kept beside the compressed
weight. What that costs is part of the time by which `dispatch.py` chooses.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ast_sparse.kernels.gpu import cusparselt as by_cusparselt
from ast_sparse.kernels.gpu import triton24

_WORKSPACE = 1 << 24  # entries of W decoded at once: they stay in the L2 cache of a large GPU
_DECODED = (16, 16)  # rows and units of a program of `decode`
_REORDERED = (32, 32)  # rows and columns of a program of `reorder`


def decode(values: Tensor, meta: Tensor) -> Tensor:
    """W `[out, in]` of fewer than 2^31 entries, as `unpack24`; values and meta are contiguous."""
    rows, units = meta.shape
    dense = values.new_empty(rows, 8 * units)
    grid = (triton.cdiv(rows, _DECODED[0]), triton.cdiv(units, _DECODED[1]))
    triton24.decode[grid](values, meta, dense, rows, units, ROWS=_DECODED[0], UNITS=_DECODED[1], num_warps=4)
    return dense


def decoded(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + b` `[tokens, out]` by decoding W a block of rows at a time; x `[tokens, in]`."""
    step = max(_WORKSPACE // x.shape[1], 64)
    if len(values) <= step:
        return F.linear(x, decode(values, meta), bias)
    out = x.new_empty(x.shape[0], values.shape[0])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        dense = decode(values[rows], meta[rows])
        if bias is None:
            torch.mm(x, dense.t(), out=out[:, rows])
        else:
            torch.addmm(bias[rows], x, dense.t(), out=out[:, rows])
    return out


def semi_structured(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """The semi-structured products that PyTorch has here for a weight of this shape, by the names of functions."""
    if dtype not in (torch.bfloat16, torch.float16) or out_features % 32 or in_features % 64:
        return []
    found = []
    if torch.cuda.get_device_capability(device)[0] == 8:  # PyTorch refuses others
        found.append("cutlass")
    # `decode` has indices of 32 bits
    if out_features * in_features < 1 << 31 and by_cusparselt.takes(out_features, in_features, dtype, device):
        found.append("cusparselt")
    return found


def cutlass_metadata(meta: Tensor) -> Tensor:
    """The metadata `[out, in/8]`, uint8, in CUTLASS's order: int16 `[out, in/16]`."""
    pairs = meta.view(torch.int16)
    reordered = torch.empty_like(pairs)
    grid = (triton.cdiv(pairs.shape[0], _REORDERED[0]), triton.cdiv(pairs.shape[1], _REORDERED[1]))
    triton24.reorder[grid](pairs, reordered, *pairs.shape, ROWS=_REORDERED[0], COLUMNS=_REORDERED[1], num_warps=4)
    return reordered


def cutlass(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + b` by CUTLASS's sparse tensor cores: our values are its values."""
    tokens, ordered = x.shape[0], cutlass_metadata(meta)
    columns = by_cusparselt.padded(x).t()
    if bias is None:
        out = torch._sparse_semi_structured_mm(values, ordered, columns)
    else:
        out = torch._sparse_semi_structured_addmm(bias, values, ordered, columns)
    return out[:, :tokens].t().contiguous()


def cusparselt(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + b` by cuSPARSELt, whose own compressed form is made from the decoded weight."""
    return by_cusparselt.linear(x, by_cusparselt.compress(decode(values, meta)), bias)
