"""Activations that transformers writes out operation by operation, in one operation of PyTorch while training.

GPT-2's GELU keeps six tensors of the width of the feed-forward layer for the backward pass; the fused one keeps its
input. Both are the same formula, equal to rounding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch.nn.functional as F
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

_TANH_GELUS = (NewGELUActivation, FastGELUActivation)
_gelu_tanh = partial(F.gelu, approximate="tanh")


@contextmanager
def fused_activations(*models: nn.Module | None) -> Iterator[None]:
    """Inside, GELUs by tanh run as `F.gelu(approximate="tanh")`; evaluation and export outside stay as they are.

    A step must be inside with its backward pass: activation checkpointing runs the forward pass again there.
    """
    with ExitStack() as stack:
        for model in models:
            for module in () if model is None else model.modules():
                if type(module) in _TANH_GELUS and "forward" not in vars(module):
                    module.forward = _gelu_tanh
                    stack.callback(delattr, module, "forward")
        yield
