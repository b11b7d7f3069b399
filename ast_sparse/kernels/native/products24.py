"""`x Wᵀ + b` and the decoding of a 2:4 weight W on a CPU, by the C kernels."""

import torch
from torch import Tensor
from torch.nn import Parameter

from ast_sparse.kernels.native.library import DTYPES, Kernels, kernels

_MOST_TOKENS = 100000
_SERIAL = 1 << 17  # multiplications of a product that one thread does as fast as a team


def takes(x: Tensor, values: Tensor, meta: Tensor) -> bool:
    """Whether `linear` computes this product; it passes no gradients."""
    if not (x.is_cpu and x.dtype is values.dtype and x.dtype in DTYPES) or torch.is_autocast_enabled("cpu"):
        return False
    out_features, kept = values.shape
    return (
        (type(values) is Parameter or type(values) is Tensor)
        and (type(x) is Tensor or type(x) is Parameter)
        and 2 * kept == x.shape[-1]
        and meta.shape == (out_features, kept // 4)
        and meta.dtype is torch.uint8
        and values.is_contiguous()
        and meta.is_contiguous()
        and 0 < x.numel() <= _MOST_TOKENS * 2 * kept
        and not torch.jit.is_tracing()
        and kernels() is not None
    )


def linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, forced: Kernels | None = None) -> Tensor:
    """`x Wᵀ + b` for tensors that `takes` accepts; sums in float32, rounded once.

    Pruned entries of W are left out, or multiplied as 0: whether an infinite x makes NaN there depends on the level and
    the number of tokens.

    Args:
        x: `[..., in]`; values `[out, in/2]`, meta `[out, in/8]`; bias: `[out]`, dtype of x.
        forced: the kernels of a level, instead of those of this process.
    """
    used = forced or kernels()
    assert used is not None
    columns, rows = x.shape[-1], values.shape[0]
    tokens = x.numel() // columns
    stride = columns
    if not x.is_contiguous():
        if x.dim() == 2 and x.stride(1) == 1:
            stride = x.stride(0)
        else:
            x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    threads = torch.get_num_threads() if tokens * rows * columns > _SERIAL else 1
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
