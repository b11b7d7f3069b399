"""The weight of a compressed layer as PEFT sees it: decoded permanently when a method needs the values.

A LoRA adapter computes beside its layer and asks the weight only for its device and dtype, so the layer stays
compressed. Merging, DoRA, PiSSA and others compute with the weight, and would use the packed values as the weight.
"""

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ast_sparse.export.codec import META, SCALE

_GETTERS: tuple[Any, ...] = (
    Tensor.device, Tensor.dtype, Tensor.shape, Tensor.ndim, Tensor.layout, Tensor.requires_grad, Tensor.is_meta,
    Tensor.is_cuda, Tensor.is_cpu, Tensor.is_mps, Tensor.is_xpu, Tensor.is_quantized, Tensor.is_sparse, Tensor.is_leaf,
    Tensor.grad,
)  # fmt: skip
_METHODS = (Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size)
_NEED_NO_VALUES = {*(getter.__get__ for getter in _GETTERS), *_METHODS}


class UndecodedWeight(Tensor):
    """Has the shape `[out, in]`, dtype and device of a compressed layer's weight. Any other use decodes the layer."""

    layer: nn.Linear

    @staticmethod
    def of(layer: nn.Linear, stored: Tensor, dtype: torch.dtype) -> "UndecodedWeight":
        """The weight of `layer`, whose values are `stored`; its dtype when it is decoded."""
        shaped = stored.new_empty(1, dtype=dtype).expand(layer.out_features, layer.in_features)
        weight = cast(UndecodedWeight, Tensor._make_subclass(UndecodedWeight, shaped))
        weight.layer = layer
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NEED_NO_VALUES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(lambda part: decode(part.layer) if isinstance(part, cls) else part, (args, kwargs))
        return func(*args, **(kwargs or {}))


def decode(layer: Any) -> nn.Parameter:
    """Turn a compressed layer into a plain `nn.Linear`, in place; return its weight `[out, in]`, which is frozen."""
    if META in layer._buffers:
        dense = layer.dense_weight().detach()
        del layer._buffers[META], layer._buffers[SCALE]
        layer.weight = nn.Parameter(dense, requires_grad=False)
        layer.__class__ = nn.Linear
    return cast(nn.Parameter, layer.weight)


def asked_by_peft() -> bool:
    """Whether the current attribute lookup comes from PEFT's `get_base_layer`.

    Elsewhere PEFT takes a module with a `base_layer` for one of its adapters.
    """
    return sys._getframe(2).f_code.co_name == "get_base_layer"
