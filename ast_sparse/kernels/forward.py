"""Parts of transformers models in faster operations of PyTorch, while a step or an evaluation runs.

GPT-2's GELU keeps six tensors of the width of the feed-forward layer for the backward pass; the fused one keeps its
input. Dense products go the way `kernels/products.py` chooses. Both are the same formulas, equal to rounding.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from ast_sparse.kernels.products import linear

_gelu_tanh = partial(F.gelu, approximate="tanh")


@contextmanager
def fast_forward(*models: nn.Module | None) -> Iterator[None]:
    """Inside, GELUs by tanh run as `F.gelu(approximate="tanh")`, dense layers by `linear`; outside all is as it was.

    A step must be inside with its backward pass: activation checkpointing runs the forward pass again there. Output
    heads are left alone, because they are called from hidden states.
    """
    with ExitStack() as stack:
        for model in models:
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore
            for module in () if model is None else model.modules():
                faster = _FASTER.get(type(module))
                if faster is not None and module is not head and "forward" not in vars(module):
                    module.forward = faster(module)
                    stack.callback(delattr, module, "forward")
        yield


def _linear_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda input: linear(input, layer.weight, layer.bias)


def _conv1d_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: linear(x, layer.weight, layer.bias, by_input=True)


_FASTER: dict[type, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    NewGELUActivation: lambda _: _gelu_tanh,
    FastGELUActivation: lambda _: _gelu_tanh,
    nn.Linear: _linear_forward,
    Conv1D: _conv1d_forward,
}
