"""PyTorch's semi-structured (2:4) products by cuSPARSELt: for prefill, and for the forward pass of training.

Not measured on a GPU yet.
"""

from functools import cache
from threading import get_ident

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.kernels.gpu.dispatch import tried

_PADDED = 8  # the products need a multiple of this many tokens
_handles: dict[int, torch.device] = {}  # of cuSPARSELt, by thread


def fits(out_features: int, in_features: int) -> bool:
    """Whether there are products for a weight of this shape."""
    return out_features % 32 == 0 and in_features % 64 == 0


def takes(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight of this shape can be compressed here and now, and multiplied by."""
    if dtype not in (torch.bfloat16, torch.float16) or not fits(out_features, in_features):
        return False
    # Up to PyTorch 2.13 each thread has one handle, made on its first GPU, that fails on another one.
    return torch.backends.cusparselt.is_available() and _handles.setdefault(get_ident(), device) == device


def compress(weight: Tensor) -> Tensor:
    """cuSPARSELt's own form of a weight, 9/16 of its bytes.

    Args:
        weight: `[out, in]`, contiguous, of a kind that `takes` accepts. Of each four consecutive entries of a row at
            most two may be other than zero; this is not checked, and the products would be wrong.
    """
    return torch._cslt_compress(weight)


def linear(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wᵀ + b`; x `[..., in]` and b `[out]` in the dtype of W."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not len(rows):  # of an expert that got no tokens
        return rows.new_empty(*x.shape[:-1], len(compressed))
    out = torch._cslt_sparse_mm(compressed, padded(rows).t(), bias=bias, transpose_result=True)
    return out[: len(rows)].view(*x.shape[:-1], out.shape[1])


def padded(x: Tensor) -> Tensor:
    """Rows `[tokens, in]` with zeros below, as many as semi-structured products need."""
    missing = -x.shape[0] % _PADDED
    return F.pad(x, (0, 0, 0, missing)) if missing else x  # `pad` copies in any case


@cache
def fault(device: torch.device) -> str | None:
    """Why there are no such products on a device, in one line; None if there are. Tried once a process and device."""
    if device.type != "cuda" or not torch.backends.cusparselt.is_available():
        return "they need an NVIDIA GPU, and a PyTorch that was built with cuSPARSELt."
    return tried(device, _wrong, needs_triton=False)


def _wrong(device: torch.device) -> bool:
    kept = torch.tensor([1, 0, 0, 1], device=device).repeat(16)
    weight = (torch.arange(32 * 64, device=device).view(32, 64) % 7 * kept).to(torch.float16)
    x = (torch.arange(9 * 64, device=device).view(9, 64) % 5).to(torch.float16)
    if not takes(32, 64, weight.dtype, weight.device):
        raise RuntimeError("this thread has used cuSPARSELt on another GPU.")
    with torch.cuda.device_of(x):
        found = linear(x, compress(weight), None)
    return not torch.equal(found, F.linear(x, weight))  # whole numbers: no sum is rounded
