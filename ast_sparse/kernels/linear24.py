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


def linear24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b`; gradients reach x, the values and b.

    Args:
        x: `[..., in]`; values `[out, in/2]` and meta `[out, in/8]`, uint8: W as `pack24` encodes it; bias: `[out]`.
            x, values and bias have one floating-point dtype.

    Returns:
        `[..., out]` in that dtype.
    """
    compiling = torch.compiler.is_compiling()
    if _is_watched(x, values, bias, compiling):
        return F.linear(x, unpack24(values, meta), bias)
    if compiling:
        return torch.ops.ast_sparse.linear24(x, values, meta, bias)
    return _linear24(x, values, meta, bias)


def _is_watched(x: Tensor, values: Tensor, bias: Tensor | None, compiling: bool) -> bool:
    """Whether something has to see each operation: gradients, torch.func, a trace, a dispatch mode, or autocast."""
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return True
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    if compiling:  # the compiler's own modes see the opaque operation
        return torch.is_autocast_enabled(x.device.type)
    return is_in_torch_dispatch_mode() or torch.jit.is_tracing()


def _linear24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    if products24.takes(x, values, meta, bias):
        return products24.linear(x, values, meta, bias)
    if gpu.takes(x, values, meta, bias):
        return gpu.linear(x, values, meta, bias)
    return F.linear(x, unpack24(values, meta), bias)


def _fake(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


_LIBRARY.define("linear24(Tensor x, Tensor values, Tensor meta, Tensor? bias) -> Tensor")
_LIBRARY.impl("linear24", _linear24, "CPU")
_LIBRARY.impl("linear24", _linear24, "CUDA")
_LIBRARY.impl("linear24", _fake, "Meta")
