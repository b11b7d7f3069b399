"""Moments in 8 bits, block by block: torchao's `OptimState8bit` (Dettmers et al., 2022, arXiv 2110.02861).

256 entries share a float32 scale, their largest magnitude. A code stands for one of 256 multiples of it, which lie
closer together near zero: from -1 to 1 for the first moment, from 0 to 1 for the second.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import Tensor

BLOCK = 256  # entries that share a scale
SMALLEST = 4096  # entries of a weight; the moments of smaller ones stay in float32, as in torchao's optimizers


def is_installed() -> bool:
    """Whether torchao is there."""
    return importlib.util.find_spec("torchao") is not None


def takes(weight: Tensor) -> bool:
    """Whether a weight of this size has 8-bit moments."""
    return weight.numel() >= SMALLEST and weight.numel() % BLOCK == 0


def zero_moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second moment of a weight before its first update, in its shape and on its device."""
    made = _state_class()
    first, second = (
        made.zeros(weight.shape, signed=signed, block_size=BLOCK, device=weight.device, dtype=weight.dtype)
        for signed in (True, False)
    )
    return first, second


def is_8bit(moment: Tensor) -> bool:
    """Whether a moment is kept in 8 bits."""
    return hasattr(moment, "codes")


def num_bytes(moment: Any) -> int:
    """The bytes that a moment takes, of either kind."""
    return int(moment.codes.nbytes + moment.scale.nbytes if is_8bit(moment) else moment.nbytes)


def blocks(moment: Any, size: int) -> Iterator[Any]:
    """Consecutive parts of an 8-bit moment, each of `size` entries, a multiple of 256; they share its memory."""
    codes, made = moment.codes.view(-1), _state_class()
    for start in range(0, codes.numel(), size):
        scale = moment.scale[start // BLOCK : (start + size) // BLOCK]
        yield made(codes[start : start + size], scale, moment.qmap, moment.signed, dtype=moment.dtype)


def decoded(moment: Any) -> Tensor:
    """The entries of an 8-bit moment in float32."""
    entries: Tensor = moment.dequantize()
    return entries


def parts(moment: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what the codes stand for; the codes are flat and share the moment's memory."""
    return moment.codes.view(-1), moment.scale, moment.qmap


@cache
def coding() -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """For compiled updates: decode(codes, qmap, scales) and encode(entries, qmap), which returns codes and scales."""
    from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap, scale_tensor

    def encode(entries: Tensor, qmap: Tensor) -> tuple[Tensor, Tensor]:
        scaled, scale = scale_tensor(entries, BLOCK)
        return quantize_8bit_with_qmap(scaled, qmap), scale

    return dequant_with_qmap, encode


@cache
def _state_class() -> Any:
    log = logging.getLogger("torchao")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of kernels for GPUs, which these moments do not use
    try:
        from torchao.optim.subclass_8bit import OptimState8bit  # it also lets `torch.load` read these moments
    finally:
        log.setLevel(level)
    return OptimState8bit


def allow_loading() -> None:
    """Let `torch.load(weights_only=True)` read 8-bit moments, if torchao is there."""
    if is_installed():
        _state_class()
