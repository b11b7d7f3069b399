"""`x Wᵀ + b` and the decoding of a 2:4 weight W on a CPU, by the C kernels (`src/`)."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ast_sparse.kernels.native.library import DTYPES, Kernels, kernels

_SERIAL = 1 << 17  # multiplications of a product that one thread does as fast as a team
_MEASURED = 512  # most tokens that the two ways are compared with: PyTorch's product needs many to be at its best
_FEW = 16  # tokens that the kernels always take
_BLOCK = 1 << 21  # entries of W that are decoded at a time, so that they stay in the cache

_STRIDED = torch.strided

# whether the kernels are the faster way, by level, dtype, shape, threads and tokens: measured once in a process
_faster: dict[tuple[Any, ...], bool] = {}


def takes(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` computes this product, which passes no gradients."""
    dtype, given = x.dtype, (x, values, meta) if bias is None else (x, values, meta, bias)
    for tensor in given:
        kind = type(tensor)
        if not (kind is Tensor or kind is Parameter) or not tensor.is_cpu or tensor.layout is not _STRIDED:
            return False
    if dtype not in DTYPES or values.dtype is not dtype or values.dim() != 2 or x.dim() == 0:
        return False
    out_features, kept = values.shape
    return (
        x.shape[-1] == 2 * kept
        and kept % 4 == 0
        and meta.dtype is torch.uint8
        and meta.shape == (out_features, kept // 4)
        and (bias is None or (bias.dtype is dtype and bias.shape == (out_features,)))
        and values.is_contiguous()
        and meta.is_contiguous()
        and x.numel() > 0
        and out_features > 0
        and not torch.is_autocast_enabled("cpu")
        and kernels() is not None  # the last question, because it may compile them
    )


def linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, forced: Kernels | None = None) -> Tensor:
    """`x Wᵀ + b` for tensors that `takes` accepts; sums in float32, rounded once.

    Pruned entries of W are left out, or multiplied as 0: whether an x that is not finite makes NaN of them depends on
    the level and the number of tokens. The levels `amx_bf16` and `avx512_bf16` take subnormal
    bfloat16 numbers as 0.

    Bits: with up to 16 tokens they depend on the level, and on whether the tokens are at most 4 (AVX2: 1), but not on
    the threads or the other tokens. With more, W may be decoded in blocks for PyTorch's product. A measurement decides
    that, so the bits may differ between two processes, numbers of threads, and numbers of tokens.

    Args:
        x: `[..., in]`; values `[out, in/2]`, meta `[out, in/8]`; bias: `[out]`, dtype of x.
        forced: the kernels of a level, for any number of tokens; None: those of this process.
    """
    used = forced or kernels()
    assert used is not None
    rows, kept = values.shape
    tokens = x.numel() // (2 * kept)
    threads = torch.get_num_threads() if tokens * rows * kept > _SERIAL else 1
    if forced is None and tokens > _FEW and not _kernels_win(used, x, values, meta, threads):
        return _by_blocks(used, x, values, meta, bias)
    return _by_kernels(used, x, values, meta, bias, threads)


def _by_kernels(used: Kernels, x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, threads: int) -> Tensor:
    """`linear` by the kernels of a level."""
    rows, kept = values.shape
    stride = columns = 2 * kept
    tokens = x.numel() // columns
    if not x.is_contiguous():
        if x.dim() == 2 and x.stride(1) == 1:
            stride = x.stride(0)
        else:
            x = x.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    status = used.linear(
        used.index,
        DTYPES[x.dtype],
        x.data_ptr(),
        stride,
        values.data_ptr(),
        meta.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        tokens,
        rows,
        columns,
        threads,
    )
    if status:
        raise MemoryError(f"No memory for a product of {tokens} tokens with {columns} columns.")
    return y


def _by_blocks(used: Kernels, x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` by decoding a block of rows at a time, and PyTorch's product with it."""
    step = _rows_of_block(x)
    if step >= values.shape[0]:
        return F.linear(x, decode(used, values, meta), bias)
    y = x.new_empty(*x.shape[:-1], values.shape[0])
    for start in range(0, values.shape[0], step):
        at = slice(start, start + step)
        y[..., at] = F.linear(x, decode(used, values[at], meta[at]), None if bias is None else bias[at])
    return y


def _rows_of_block(x: Tensor) -> int:
    return max(_BLOCK // x.shape[-1], 1)


def decode(used: Kernels, values: Tensor, meta: Tensor) -> Tensor:
    """W `[out, in]`, exactly 0.0 where pruned, from contiguous values and metadata of 2 or 4 bytes an entry."""
    rows, columns = values.shape[0], 2 * values.shape[1]
    dense = values.new_empty(rows, columns)
    pointers = (values.data_ptr(), meta.data_ptr(), dense.data_ptr())
    used.decode(used.index, values.element_size(), *pointers, rows, columns, torch.get_num_threads())
    return dense


def _kernels_win(used: Kernels, x: Tensor, values: Tensor, meta: Tensor, threads: int) -> bool:
    """Whether the kernels are faster than decoding W for PyTorch's product.

    Measured at the first call with so many tokens, to the next power of two, on the first block of `_by_blocks`.
    """
    tokens = min(1 << (x.numel() // x.shape[-1] - 1).bit_length(), _MEASURED)
    key = (used.level, x.dtype, values.shape, threads, tokens)
    if key not in _faster:
        sample = torch.ones(tokens, x.shape[-1], dtype=x.dtype, device="cpu")
        block = slice(0, _rows_of_block(x))
        values, meta = values[block], meta[block]
        seconds = _least_seconds(
            lambda: _by_blocks(used, sample, values, meta, None),
            lambda: _by_kernels(used, sample, values, meta, None, threads),
        )
        _faster[key] = seconds[1] < seconds[0]
    return _faster[key]


def _least_seconds(*calls: Callable[[], Any]) -> list[float]:
    """The least time of each: in turns, so that none alone meets cold memory or a busy machine."""
    times = []
    for _ in range(7):
        times.append([_seconds(call) for call in calls])
    return [min(each) for each in zip(*times, strict=True)]


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
