"""`x Wᵀ + b` with W in the 2:4 code: one function for every device, and one opaque operation for compilers and graphs.

The plain way decodes W and calls `F.linear`. Faster ways, with results equal within rounding, keep W compressed: those
of `kernels/native/` on a CPU, those of `kernels/gpu/` on an NVIDIA GPU. They read memory where PyTorch does not see it.
So whatever has to see each operation goes the plain way: gradients of any kind, torch.func, tracing, autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ast_sparse.kernels.code24 import unpack24
from ast_sparse.kernels.gpu import dispatch as gpu
from ast_sparse.kernels.native import products24

_LIBRARY = torch.library.Library("ast_sparse", "DEF")


def linear24(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    slorb: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`x Wᵀ + b`, and with SLoRB `+ S(Xx)`; gradients reach every floating-point tensor.

    Args:
        x: `[..., in]`; values `[out, in/2]` and meta `[out, in/8]`, uint8: W as `pack24` encodes it; bias: `[out]`.
            x, values, bias, S and X have one floating-point dtype.
        slorb: S `[out, rank]` and X `[rank, in]`.

    Returns:
        `[..., out]` in that dtype.
    """
    s, projection = slorb or (None, None)
    compiling = torch.compiler.is_compiling()
    if _is_watched(x, (values, bias, s, projection), compiling):
        return plus_slorb(F.linear(x, unpack24(values, meta), bias), x, slorb)
    if compiling:
        return torch.ops.ast_sparse.linear24(x, values, meta, bias, s, projection)
    return _linear24(x, values, meta, bias, s, projection)


def plus_slorb(y: Tensor, x: Tensor, slorb: tuple[Tensor, Tensor] | None) -> Tensor:
    """`y + S(Xx)`; y unchanged without SLoRB."""
    return y if slorb is None else y + F.linear(F.linear(x, slorb[1]), slorb[0])


def _is_watched(x: Tensor, others: tuple[Tensor | None, ...], compiling: bool) -> bool:
    """Whether something has to see each operation: gradients, torch.func, a trace, a dispatch mode, or autocast."""
    if torch.is_grad_enabled() and (x.requires_grad or any(each is not None and each.requires_grad for each in others)):
        return True
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    if compiling:  # the compiler's own modes see the opaque operation
        return torch.is_autocast_enabled(x.device.type)
    return is_in_torch_dispatch_mode() or torch.jit.is_tracing()


def _linear24(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    s: Tensor | None = None,
    projection: Tensor | None = None,
) -> Tensor:
    slorb = None if s is None or projection is None else (s, projection)
    if products24.takes(x, values, meta, bias):
        return plus_slorb(products24.linear(x, values, meta, bias), x, slorb)
    if gpu.takes(x, values, meta, bias, slorb):
        return gpu.linear(x, values, meta, bias, slorb)
    return plus_slorb(F.linear(x, unpack24(values, meta), bias), x, slorb)


def _fake(x: Tensor, values: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


_LIBRARY.define(
    "linear24(Tensor x, Tensor values, Tensor meta, Tensor? bias, Tensor? s=None, Tensor? projection=None) -> Tensor"
)
_LIBRARY.impl("linear24", _linear24, "CPU")
_LIBRARY.impl("linear24", _linear24, "CUDA")
_LIBRARY.impl("linear24", _fake, "Meta")
