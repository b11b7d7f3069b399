"""Selective recomputation: outputs that are cheap to compute again are not kept for the backward pass.

Norms, activation functions and MLP gates take almost no arithmetic, but their outputs are more than half of the
activations that the products after them keep. They are recomputed when a backward pass asks for them.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

_REMEMBERED = 8  # outputs; some models have two more norms between a norm and the last product that uses it


class Recomputation(saved_tensors_hooks):
    """A context for forward and backward pass, in which outputs of calls to it are recomputed instead of kept.

    `recompute(function, *inputs)` calls a function of tensors, which must do the same each time. If autograd would keep
    its output unchanged, it keeps the inputs instead, which the function's own gradient needs anyway.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, self._unpack)
        self._outputs: deque[_Output] = deque(maxlen=_REMEMBERED)
        self._latest: tuple[_Recipe | None, Tensor | None] = (None, None)  # several products have the same input

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._outputs.clear()  # hooks refer to their context: otherwise these would wait for the garbage collector
        self._latest = (None, None)

    def __call__(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        recipe = _Recipe(function, *inputs)
        output = function(*inputs)
        can_be_kept_away = output.requires_grad and output.is_contiguous() and recipe.inputs_are_unchanged
        if can_be_kept_away and not torch.compiler.is_compiling():
            self._outputs.appendleft(_Output(output, recipe))
        return output

    def _pack(self, tensor: Tensor) -> Any:
        recipe = next((output.recipe for output in self._outputs if output.is_in(tensor)), None)
        return (tensor.detach(), tensor._version) if recipe is None else (recipe, tensor.shape)

    def _unpack(self, packed: Any) -> Tensor:
        self._outputs.clear()  # the backward pass has begun, and it frees inputs as it goes
        if not isinstance(packed[0], _Recipe):
            tensor, version = packed
            if tensor._version != version:  # autograd does not check this if there are hooks
                raise _changed(f"a tensor of shape {tuple(tensor.shape)}")
            return cast(Tensor, tensor)
        recipe, shape = packed
        known, value = self._latest
        if known is not recipe or value is None:
            self._latest = (None, None)  # free it before the next one is computed
            value = recipe()
            self._latest = (recipe, value)
        return value.view(shape)


class _Recipe:
    """A function, its inputs as they were before the first call, and its autocast."""

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        self._function, self._inputs = function, [each.detach() for each in inputs]
        self._versions = [each._version for each in self._inputs]
        device = inputs[0].device.type
        lower, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._autocast = partial(torch.autocast, device, lower, enabled)

    @property
    def inputs_are_unchanged(self) -> bool:
        return [each._version for each in self._inputs] == self._versions

    def __call__(self) -> Tensor:
        if not self.inputs_are_unchanged:
            raise _changed("the input of a norm, an activation function or a gate")
        with torch.no_grad(), self._autocast():
            return self._function(*self._inputs)


def _changed(what: str) -> RuntimeError:
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation (or the "
        f"backward pass ran a second time): {what}"
    )


class _Output:
    """What identifies an output without keeping it."""

    def __init__(self, output: Tensor, recipe: _Recipe) -> None:
        self.recipe = recipe
        self._storage = StorageWeakRef(output.untyped_storage())  # while this exists, no other storage has its address
        self._about = _about(output)

    def is_in(self, tensor: Tensor) -> bool:
        """Whether the tensor is the output, unchanged and in its order, in any shape."""
        same_storage = self._storage.cdata == tensor.untyped_storage()._cdata
        return same_storage and self._about == _about(tensor) and tensor.is_contiguous()


def _about(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor._version
