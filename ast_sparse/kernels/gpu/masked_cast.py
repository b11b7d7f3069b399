"""`m ⊙ W` in the dtype of the products on an NVIDIA GPU: one pass instead of a cast and a `where`.

It reads W and m once and writes the result once: 7 bytes a weight from float32 to 16 bits. Not measured on a GPU yet.
With AST_SPARSE_GPU=plain, and wherever the kernel cannot run, PyTorch's operations do the same, to the bit.
"""

import logging
from functools import cache

import torch
from torch import Tensor

from ast_sparse.kernels.gpu.dispatch import is_interpreted, setting, tried

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SIZE, _WARPS = 1024, 4  # entries and warps of a program: a thread has eight entries


def takes(values: Tensor, mask: Tensor, dtype: torch.dtype) -> bool:
    """Whether `masked_cast` makes this tensor.

    Raises:
        UserError: the environment variable has an unknown value.
    """
    if torch.compiler.is_compiling() or not (values.is_cuda or (values.device.type == "cpu" and is_interpreted())):
        return False
    if {type(values), type(mask)} - {Tensor, torch.nn.Parameter}:
        return False
    if values.dtype not in _DTYPES or dtype not in _DTYPES or mask.dtype != torch.bool or values.numel() == 0:
        return False
    fits = mask.shape == values.shape and mask.device == values.device
    fits = fits and values.is_contiguous() and mask.is_contiguous()
    return fits and setting() != "plain" and fault(values.device) is None


def masked_cast(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.where(mask, values, 0).to(dtype)` for what `takes` accepts, to the bit; without gradients.

    Args:
        values: bfloat16, float16 or float32, contiguous; mask: bool of its shape, True = kept.
        dtype: of the result, one of the same three.
    """
    import triton

    from ast_sparse.kernels.gpu import triton_masked

    out = torch.empty_like(values, dtype=dtype, requires_grad=False)
    with torch.cuda.device_of(values):  # Triton launches on the current GPU
        triton_masked.masked_cast[(triton.cdiv(values.numel(), _SIZE),)](
            values.detach(), mask.detach().view(torch.uint8), out, values.numel(),
            AS_BITS=is_interpreted(), SIZE=_SIZE, num_warps=_WARPS,
        )  # fmt: skip
    return out


@cache
def fault(device: torch.device) -> str | None:
    """Why the kernel cannot be used on a device, in one line that is also logged; None if it can.

    Tried once a process and device, on a few numbers.
    """
    reason = tried(device, _wrong)
    if reason is not None:
        logger.warning(f"Weights are masked by several kernels instead of one on {device}: {reason}")
    return reason


def _wrong(device: torch.device) -> bool:
    values = torch.tensor([1.0, -2.5, 1 + 3 * 2.0**-9, -0.0], device=device)
    mask = torch.tensor([True, False, True, True], device=device)
    wanted = torch.where(mask, values, 0).to(torch.bfloat16)
    return not torch.equal(masked_cast(values, mask, torch.bfloat16), wanted)
