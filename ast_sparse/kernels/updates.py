"""One AdamW update with the decay on pruned weights, by placement (paper Sec. 3.2 and 6.6).

The compiled update is one pass over weight, gradient, mask and moments. The eager one works block by block: the term
of the placement is computed into a temporary of one block, and torch's fused AdamW does the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ast_sparse.kernels import moments8bit
from ast_sparse.kernels.choice import Kernels, compile_kernel

_BLOCK = 1 << 18  # elements of an eager block on a CPU


@dataclass(frozen=True)
class StepValues:
    """The scalars of one update; steps count from 1, and `mask_decay` is λ(t).

    Attributes:
        is_l1: the decay is `λ·sign(W)` instead of `λ·W`.
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    mask_decay: float
    is_l1: bool = False

    @property
    def correction1(self) -> float:
        """`1 − β1^t`."""
        return 1 - self.beta1**self.step

    @property
    def correction2(self) -> float:
        """`1 − β2^t`."""
        return 1 - self.beta2**self.step

    def as_tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The values as a tensor for the compiled updates, so that a new value does not compile them again."""
        values = [
            self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, 1 - self.lr * self.weight_decay,
            self.lr / self.correction1, self.correction2**-0.5, self.eps, self.mask_decay, self.lr * self.mask_decay,
        ]  # fmt: skip
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def update_weights(
    placement: str,
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    first: Tensor,
    second: Tensor,
    values: StepValues,
    kernels: Kernels,
) -> None:
    """One update of one masked weight and its moments, in place.

    Args:
        placement: a key of `PLACEMENTS`.
        weight, grad, mask, first, second: of one shape, this process's pieces; mask bool, True = kept. For 16-bit
            weights the compiled kernels compute in float32, the eager ones as torch's fused AdamW does. The moments
            may be 8-bit ones, which are coded again after each update.
    """
    if moments8bit.is_8bit(first):
        _update_8bit(placement, weight.detach(), grad.detach(), mask.detach(), first, second, values, kernels)
        torch.autograd.graph.increment_version(weight)
        return
    w, g, m, first_, second_ = (tensor.detach().contiguous() for tensor in (weight, grad, mask, first, second))
    (_update_eager if kernels == "eager" else _update_compiled)(placement, w, g, m, first_, second_, values)
    for target, result in ((weight.detach(), w), (first, first_), (second, second_)):
        if not target.is_contiguous():
            target.copy_(result)
    torch.autograd.graph.increment_version(weight)  # autograd sees neither kind of update


def _update_eager(
    placement: str, weight: Tensor, grad: Tensor, mask: Tensor, first: Tensor, second: Tensor, values: StepValues
) -> None:
    rows = len(weight) or 1
    if weight.device.type == "cpu" and weight.numel():
        rows = max(_BLOCK * rows // weight.numel(), 1)
    blocks = (tensor.split(rows) for tensor in (weight, grad, mask, first, second))
    for w, g, m, u, v in zip(*blocks, strict=True):
        PLACEMENTS[placement][0](w, g, m, u, v, values)


def _update_compiled(
    placement: str, weight: Tensor, grad: Tensor, mask: Tensor, first: Tensor, second: Tensor, values: StepValues
) -> None:
    computed_in = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w, g, m, u, v = (tensor.view(-1) for tensor in (weight, grad, mask, first, second))
    # vectors of booleans are slow in the inductor, vectors of bytes are not
    scalars = values.as_tensor(computed_in, weight.device)
    _compiled_update(PLACEMENTS[placement][1], values.is_l1)(w, g, m.view(torch.int8), u, v, scalars)


def _update_8bit(
    placement: str,
    weight: Tensor,
    grad: Tensor,
    mask: Tensor,
    first: Tensor,
    second: Tensor,
    values: StepValues,
    kernels: Kernels,
) -> None:
    """One pass if compiled; otherwise block by block, so that the moments in float32 take the memory of one block."""
    w, g, m = (tensor.contiguous().view(-1) for tensor in (weight, grad, mask))
    if kernels == "compiled":
        scalars = values.as_tensor(torch.float32, weight.device)
        states = (*moments8bit.parts(first), *moments8bit.parts(second))
        _compiled_8bit(PLACEMENTS[placement][1], values.is_l1)(w, g, m.view(torch.int8), *states, scalars)
    else:
        size = _BLOCK if weight.device.type == "cpu" else w.numel()
        parts = (w.split(size), g.split(size), m.split(size))
        codes = (moments8bit.blocks(first, size), moments8bit.blocks(second, size))
        for w_, g_, m_, u, v in zip(*parts, *codes, strict=True):
            first_, second_ = moments8bit.decoded(u), moments8bit.decoded(v)
            PLACEMENTS[placement][0](w_, g_, m_, first_, second_, values)
            u.copy_(first_)
            v.copy_(second_)
    if not weight.is_contiguous():
        weight.copy_(w.view(weight.shape))


def _momentum_eager(w: Tensor, g: Tensor, mask: Tensor, first: Tensor, second: Tensor, values: StepValues) -> None:
    """(20)-(23): the decay enters the step and the second moment, never the first moment."""
    first.lerp_(g, 1 - values.beta1)
    step = _plus_decay(first, w, mask, values)
    correction = values.correction1  # AdamW with β1 = 0 uses its gradient as the first moment
    _adamw(w, step, torch.zeros_like(first), second, values, 0.0, values.lr / correction, correction)


def _gradient_eager(w: Tensor, g: Tensor, mask: Tensor, first: Tensor, second: Tensor, values: StepValues) -> None:
    """(18)-(19): `g̃ = g + λ (¬m ⊙ W)`, then plain AdamW on g̃."""
    _adamw(w, _plus_decay(g, w, mask, values), first, second, values, values.beta1, values.lr)


def _weight_eager(w: Tensor, g: Tensor, mask: Tensor, first: Tensor, second: Tensor, values: StepValues) -> None:
    """(16)-(17): AdamW, and the decay directly on the weight."""
    decay = _pruned(mask, w.dtype) * _decaying(w, values.is_l1)
    _adamw(w, g, first, second, values, values.beta1, values.lr)
    w.sub_(decay, alpha=values.lr * values.mask_decay)


def _plus_decay(to: Tensor, w: Tensor, mask: Tensor, values: StepValues) -> Tensor:
    decay = values.mask_decay
    return torch.addcmul(to, _pruned(mask, w.dtype), _decaying(w, values.is_l1), value=decay) if decay else to


def _decaying(w: Tensor, is_l1: bool) -> Tensor:
    """What λ multiplies: the gradient of `|W|²/2` or of `|W|`."""
    return w.sign() if is_l1 else w


def _pruned(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 where pruned: on a CPU a product with it takes a tenth of the time of `torch.where`; bytes convert faster."""
    return (~mask).view(torch.uint8).to(dtype)


def _adamw(
    w: Tensor, g: Tensor, first: Tensor, second: Tensor, values: StepValues, beta1: float, lr: float, share: float = 1.0
) -> None:
    on_cpu = w.device.type == "cpu"
    step = torch.tensor(float(values.step - 1))
    adamw(
        [w], [g], [first], [second], [], [step], foreach=not on_cpu, fused=on_cpu, amsgrad=False, beta1=beta1,
        beta2=values.beta2, lr=lr, weight_decay=values.weight_decay * share, eps=values.eps, maximize=False,
    )  # fmt: skip


def _momentum(w: Tensor, g: Tensor, decay: Tensor, first: Tensor, second: Tensor, s: Sequence[Tensor]) -> list[Tensor]:
    first = first * s[0] + g * s[1]
    step = first + decay * s[8]
    second = second * s[2] + step * step * s[3]
    return [_descend(w, step, second, s), first, second]


def _gradient(w: Tensor, g: Tensor, decay: Tensor, first: Tensor, second: Tensor, s: Sequence[Tensor]) -> list[Tensor]:
    g = g + decay * s[8]
    first = first * s[0] + g * s[1]
    second = second * s[2] + g * g * s[3]
    return [_descend(w, first, second, s), first, second]


def _weight(w: Tensor, g: Tensor, decay: Tensor, first: Tensor, second: Tensor, s: Sequence[Tensor]) -> list[Tensor]:
    first = first * s[0] + g * s[1]
    second = second * s[2] + g * g * s[3]
    return [_descend(w, first, second, s) - decay * s[9], first, second]


def _descend(w: Tensor, direction: Tensor, second: Tensor, s: Sequence[Tensor]) -> Tensor:
    """`(1 − γ·wd) W − γ · direction / ((1 − β1^t)(√v̂ + ε))`."""
    return w * s[4] - direction / (second.sqrt() * s[6] + s[7]) * s[5]


Eager = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, StepValues], None]
Pure = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]], list[Tensor]]
PLACEMENTS: dict[str, tuple[Eager, Pure]] = {
    "momentum": (_momentum_eager, _momentum),
    "gradient": (_gradient_eager, _gradient),
    "weight": (_weight_eager, _weight),
}


@cache
def _compiled_update(update: Pure, is_l1: bool) -> Callable[..., Any]:
    def in_place(w: Tensor, g: Tensor, kept: Tensor, first: Tensor, second: Tensor, values: Tensor) -> None:
        scalars = values.unbind()
        w_, g_, first_, second_ = (tensor.to(values.dtype) for tensor in (w, g, first, second))
        # faster than `torch.where` on the inductor's vectors
        decay = _decaying(w_, is_l1) * (1 - kept.to(values.dtype))
        for target, result in zip((w, first, second), update(w_, g_, decay, first_, second_, scalars), strict=True):
            target.copy_(result)

    return compile_kernel(in_place)


@cache
def _compiled_8bit(update: Pure, is_l1: bool) -> Callable[..., Any]:
    decode, encode = moments8bit.coding()

    def in_place(
        w: Tensor, g: Tensor, kept: Tensor, codes1: Tensor, scale1: Tensor, map1: Tensor, codes2: Tensor,
        scale2: Tensor, map2: Tensor, values: Tensor,
    ) -> None:  # fmt: skip
        w_, g_ = w.to(values.dtype), g.to(values.dtype)
        first, second = decode(codes1, map1, scale1), decode(codes2, map2, scale2)
        decay = _decaying(w_, is_l1) * (1 - kept.to(values.dtype))
        new, first, second = update(w_, g_, decay, first, second, values.unbind())
        w.copy_(new)
        for entries, map_, codes, scale in ((first, map1, codes1, scale1), (second, map2, codes2, scale2)):
            for target, result in zip((codes, scale), encode(entries, map_), strict=True):
                target.copy_(result)

    return compile_kernel(in_place)
