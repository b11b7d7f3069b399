"""The masked weight `m ⊙ W`, masked gradients, and matrix products with a weight.

For float32 PyTorch calls MKL, whose products on CPUs of AMD stop at AVX2, at half of what a core with AVX-512 can do.
There `linear` and `product` go through oneDNN, which PyTorch brings along; `torch.backends.mkldnn.flags(enabled=False)`
switches it off. Everywhere else they are the functions of PyTorch that they stand for.
"""

import logging
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORTHWHILE = 1 << 22  # multiplications of a product, 40 µs; what Python takes on the way is less

_BLOCK = 1 << 22  # elements of a product that is made to be added


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is True, and 0.0 elsewhere, never -0.0; bit for bit `torch.where(mask, values, 0)`.

    On a CPU the bits of the values and of the mask are joined: `torch.where` goes element by element there, and takes
    twenty times as long.

    Args:
        values: any float dtype; mask: bool of its shape.
    """
    integer = _INTEGERS.get(values.element_size())
    plain = type(values) in (Tensor, torch.nn.Parameter) and values.device.type == "cpu"
    if integer is None or not plain or torch.compiler.is_compiling():
        return torch.where(mask, values, 0)
    bits = (-mask.view(torch.int8)).to(integer)  # all ones where kept
    return bits.bitwise_and_(values.detach().view(integer)).view(values.dtype)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, by_input: bool = False) -> Tensor:
    """`input Wᵀ + b` as `F.linear`, or with `by_input` the `input W + b` of GPT-2's Conv1D; equal to rounding.

    Args:
        input: `[..., in]`; weight: `[out, in]`, with `by_input` `[in, out]`; bias: `[out]`.
    """
    width = weight.shape[1 if by_input else 0]
    if _through_onednn(input, weight, input.numel() * width) and (bias is None or bias.dtype == torch.float32):
        rows = input.reshape(-1, input.shape[-1])
        return cast(Tensor, _Linear.apply(rows, weight, bias, by_input)).view(*input.shape[:-1], width)
    if not by_input:
        return F.linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    product = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return product.view(*input.shape[:-1], width)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right` of two matrices, equal to rounding; for code that keeps no gradients.

    Args:
        out: memory that may be used for the result.
    """
    if _through_onednn(left, right, left.numel() * right.shape[1]):
        return _onednn(left, right)
    return torch.mm(left, right, out=out)


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """`target += left @ right`, as `product`; what oneDNN cannot add in place is made a block of rows at a time."""
    if left.dtype != target.dtype:
        target.add_(product(left, right))
    elif not _through_onednn(left, right, left.numel() * right.shape[1]):
        target.addmm_(left, right)
    else:
        rows = max(_BLOCK // right.shape[1], 1)
        for part, factor in zip(target.split(rows), left.split(rows), strict=True):
            part.add_(_onednn(factor, right))


def _through_onednn(left: Tensor, right: Tensor, multiplications: int) -> bool:
    return (
        not torch.compiler.is_compiling()
        and multiplications >= _WORTHWHILE
        and onednn_is_faster()
        and all(
            each.dtype == torch.float32 and each.device.type == "cpu" and type(each) in (Tensor, torch.nn.Parameter)
            for each in (left, right)
        )
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def onednn_is_faster() -> bool:
    """Whether this is a CPU of AMD with AVX-512 and PyTorch's products are MKL's; False where torch does not tell."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    faster = bool(capabilities.get("avx512_f")) and str(capabilities.get("cpu_name")).startswith("AMD")
    if faster:
        logger.info("Float32 products on this CPU go through oneDNN.")
    return faster


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left @ right + bias`, by the function that torch.compile takes for linear layers."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], ""))


class _Linear(torch.autograd.Function):
    """`rows Wᵀ + b`, or `rows W + b`: three products with gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, by_input: bool) -> Tensor:
        ctx.by_input = by_input
        ctx.save_for_backward(rows, weight)
        return _onednn(rows, weight if by_input else weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (rows, weight) = grads, ctx.saved_tensors
        by_rows = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_rows = _onednn(grad, weight.t() if ctx.by_input else weight)
        if ctx.needs_input_grad[1]:
            by_weight = _onednn(rows.t(), grad) if ctx.by_input else _onednn(grad.t(), rows)
        if ctx.needs_input_grad[2]:
            by_bias = grad.sum(0)
        return by_rows, by_weight, by_bias, None
