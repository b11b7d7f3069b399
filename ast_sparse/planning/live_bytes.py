"""The bytes of all tensors, real or fake, that are alive while a step runs."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all live storages after every operation.

    Attributes:
        now, peak: bytes.
        gradients, peak_gradients: the bytes of gradients that `counted_gradients` reports, now and at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.peak_gradients = 0
        self._sizes: dict[int, int] = {}

    def ignore(self, tensors: list[Tensor]) -> None:
        """Leave out the storages of tensors that are counted elsewhere."""
        self._sizes.update({tensor.untyped_storage()._cdata: 0 for tensor in tensors})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            result = torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long)  # assumes that no element is zero
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._drop, storage._cdata)
        if self.now > self.peak:
            self.peak, self.peak_gradients = self.now, self.gradients

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@contextmanager
def counted_gradients(model: nn.Module, live: LiveBytes, drop: bool) -> Iterator[None]:
    """Report each new gradient to `live`; with `drop`, remove it instead, as if it were added to an existing one."""

    def count(parameter: Tensor) -> None:
        if drop:
            parameter.grad = None
        else:
            live.gradients += parameter.nbytes

    handles = [p.register_post_accumulate_grad_hook(count) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
