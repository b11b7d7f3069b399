"""The terms of the loss on the output distribution, as numbers."""

import math
from dataclasses import dataclass

import torch

from ast_sparse.config import DistillationConfig

IGNORE_INDEX = -100
_LARGEST_KEPT = 16384.0  # of gradients in float16, whose largest number is 65504


@dataclass(frozen=True)
class Terms:
    """The terms of the loss of one position."""

    kind: str
    ce_weight: float
    kl_weight: float  # 0 if D uses no logits
    temperature: float

    @classmethod
    def of(cls, config: DistillationConfig | None) -> "Terms":
        """The terms of a config; None means plain cross-entropy."""
        if config is None:
            return cls("kl", 1.0, 0.0, 1.0)
        ce_weight, kl_weight = config.weights
        return cls(config.kind, ce_weight, 0.0 if config.kind == "mobilebert" else kl_weight, config.temperature)


def gradient_scale(terms: Terms, dtype: torch.dtype) -> float:
    """A power of two that gradients are multiplied by where they are kept in a dtype; 1.0 except for float16.

    Most of `p − onehot` is below 6e-8, the smallest float16, and the scaler of the loss multiplies only the gradient of
    the whole loss. The largest entry is about `w_ce + w_kl · T`; under reverse KL it grows with the difference of the
    log probabilities, taken to be below 64.
    """
    if dtype != torch.float16:
        return 1.0
    slope = 16.0 if terms.kind == "reverse_kl" else 1.0
    largest = terms.ce_weight + terms.kl_weight * max(terms.temperature, 1 / terms.temperature) * slope
    return 2.0 ** math.floor(math.log2(_LARGEST_KEPT / max(largest, 1e-3)))
