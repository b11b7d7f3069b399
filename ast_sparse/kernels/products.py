"""The masked weight `m ⊙ W`, masked gradients, and matrix products with a weight.

`linear` and `product` call the same functions of PyTorch. On one kind of CPU, if `kernels/cpu/setting.py` allows it,
they use oneDNN, with results equal within rounding.
"""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.errors import one_line
from ast_sparse.kernels.cpu import onednn
from ast_sparse.kernels.gpu import masked_cast

logger = logging.getLogger(__name__)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is True, and 0.0 elsewhere, never -0.0; bit for bit `torch.where(mask, values, 0)`.

    On a CPU this is a bitwise and of values and mask: `torch.where` goes element by element there, and takes twenty
    times as long.

    Args:
        values: any float dtype; mask: bool of its shape.
    """
    integer = _INTEGERS.get(values.element_size())
    plain = type(values) in (Tensor, torch.nn.Parameter) and values.device.type == "cpu"
    if integer is None or not plain or torch.compiler.is_compiling():
        return torch.where(mask, values, 0)
    bits = (-mask.view(torch.int8)).to(integer)  # all ones where kept
    return bits.bitwise_and_(values.detach().view(integer)).view(values.dtype)


def masked_as(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`masked(values, mask)` in another dtype; bit for bit `torch.where(mask, values, 0).to(dtype)`.

    On a GPU this is one pass (`gpu/masked_cast.py`). Elsewhere values are cast first if that makes them smaller: what
    is rounded to inf or NaN and pruned is 0.0 in either order.

    Args:
        values: any float dtype; mask: bool of its shape, True = kept.
    """
    if masked_cast.takes(values, mask, dtype):
        return masked_cast.masked_cast(values, mask, dtype)
    if dtype.itemsize < values.element_size():
        return masked(values.to(dtype), mask)
    return masked(values, mask).to(dtype)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, group_dim: int = 1) -> Tensor:
    """`input Wᵀ + b` as in `F.linear`, or with `group_dim=0` `input W + b` as in GPT-2's Conv1D; equal within rounding.

    Args:
        input: `[..., in]`; weight: `[out, in]`, with `group_dim=0` `[in, out]`; bias: `[out]`.
    """
    width = weight.shape[1 - group_dim]
    if onednn.takes(input, weight, input.numel() * width) and (bias is None or bias.dtype == torch.float32):
        return onednn.linear(input, weight, bias, group_dim)
    if group_dim == 1:
        return F.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    product = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return product.view(*input.shape[:-1], width)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right` of two matrices, equal within rounding; for code without gradients.

    Args:
        out: memory that may be used for the result.
    """
    if onednn.takes(left, right, left.numel() * right.shape[1]):
        return onednn.product(left, right)
    return torch.mm(left, right, out=out)


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """`target += left @ right`, equal within rounding."""
    if left.dtype != target.dtype:
        target.add_(product(left, right))
    elif onednn.takes(left, right, left.numel() * right.shape[1]):
        onednn.add_product(target, left, right)
    else:
        target.addmm_(left, right)


def product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` of two matrices in float16, summed and returned in float32, where it does not overflow."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def product_as(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` of two matrices in another dtype.

    On a GPU a product of 16 bits is summed and written in float32 by one kernel, without being rounded in between.
    """
    if left.dtype == dtype:
        return product(left, right)
    widens = left.is_cuda and left.dtype.itemsize == 2 and dtype == torch.float32
    if widens and _adds_in_float32(left.dtype, dtype, left.device):
        return torch.mm(left, right, out_dtype=dtype)
    return product(left, right).to(dtype)


def product_into(target: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """`target = left @ right`, or `target += left @ right`, summed and kept in the dtype of `target`.

    On a GPU this is one kernel, also for matrices of 16 bits and a target in float32.
    """
    if left.dtype == target.dtype:
        if add:
            add_product(target, left, right)
        elif (result := product(left, right, out=target)) is not target:
            target.copy_(result)
    elif left.is_cuda and _adds_in_float32(left.dtype, target.dtype, left.device):
        if add:
            torch.addmm(target, left, right, out_dtype=target.dtype, out=target)
        else:
            torch.mm(left, right, out_dtype=target.dtype, out=target)
    else:
        result = product_in_float32(left, right) if left.dtype == torch.float16 else product(left, right)
        (target.add_ if add else target.copy_)(result)


@torch.compiler.assume_constant_result  # a compiled graph asks when it is traced
def _adds_in_float32(dtype: torch.dtype, wide: torch.dtype, device: torch.device) -> bool:
    """Whether products of matrices of a 16-bit dtype can be added to one in float32 on a GPU; tried once."""
    return _added_in_float32(dtype, wide, device)


@cache
def _added_in_float32(dtype: torch.dtype, wide: torch.dtype, device: torch.device) -> bool:
    ones, target = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, dtype=wide, device=device)
    try:
        torch.mm(ones, ones, out_dtype=wide, out=target)
        torch.addmm(target, ones, ones, out_dtype=wide, out=target)
        return bool((target == 32).all())
    except (RuntimeError, TypeError, NotImplementedError) as error:  # other versions of PyTorch, other libraries
        logger.warning(f"Gradients of weights are rounded to {str(dtype)[6:]} on {device}: {one_line(error)}")
        return False
