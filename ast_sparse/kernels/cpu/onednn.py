"""Float32 matrix products through oneDNN, which is part of PyTorch.

For float32 PyTorch calls MKL, whose products on AMD CPUs use only AVX2, at half the speed of a core with AVX-512.
`torch.backends.mkldnn.flags(enabled=False)` turns this off too.
"""

import logging
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ast_sparse.kernels.cpu import setting

logger = logging.getLogger(__name__)

_WORTHWHILE = 1 << 22  # multiplications of a product, 40 µs; the Python overhead is less
_BLOCK = 1 << 22  # elements of a product that is then added


def takes(left: Tensor, right: Tensor, multiplications: int) -> bool:
    """Whether a product of these two, in either layout, goes through oneDNN."""
    return (
        not torch.compiler.is_compiling()
        and multiplications >= _WORTHWHILE
        and is_faster()
        and all(
            each.dtype == torch.float32 and each.device.type == "cpu" and type(each) in (Tensor, torch.nn.Parameter)
            for each in (left, right)
        )
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512, and PyTorch's products are those of MKL."""
    if not setting.is_enabled():
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    capabilities = setting.capabilities()
    faster = bool(capabilities.get("avx512_f")) and str(capabilities.get("cpu_name")).startswith("AMD")
    if faster:
        logger.info("Float32 products on this CPU go through oneDNN.")
    return faster


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, group_dim: int) -> Tensor:
    """`products.linear` for tensors that `takes` accepts; bias float32."""
    rows = input.reshape(-1, input.shape[-1])
    width = weight.shape[1 - group_dim]
    return cast(Tensor, _Linear.apply(rows, weight, bias, group_dim)).view(*input.shape[:-1], width)


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right + bias`, by the function that torch.compile uses for linear layers."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], ""))


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """`target += left @ right`, a block of rows at a time: oneDNN cannot add in place."""
    rows = max(_BLOCK // right.shape[1], 1)
    for part, factor in zip(target.split(rows), left.split(rows), strict=True):
        part.add_(product(factor, right))


class _Linear(torch.autograd.Function):
    """`rows Wᵀ + b`, or `rows W + b`: three products with gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, group_dim: int) -> Tensor:
        ctx.group_dim = group_dim
        ctx.save_for_backward(rows, weight)
        return product(rows, weight if group_dim == 0 else weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, weight) = grads, ctx.saved_tensors
        by_rows = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_rows = product(grad, weight.t() if ctx.group_dim == 0 else weight)
        if ctx.needs_input_grad[1]:
            by_weight = product(rows.t(), grad) if ctx.group_dim == 0 else product(grad.t(), rows)
        if ctx.needs_input_grad[2]:
            by_bias = grad.sum(0)
        return by_rows, by_weight, by_bias, None
