"""The bytes of all tensors, real or fake, that are alive while a step runs."""

import weakref
from collections import Counter
from collections.abc import Collection, Iterator
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
        phase, peaks: the name of what runs now, which the caller sets, and the most bytes in each phase.
        gradients, peak_gradients: the bytes of gradients that `counted_gradients` reports, now and at the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.peak_gradients = 0
        self.phase, self.peaks = "", Counter[str]()
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
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)
        if self.now > self.peak:
            self.peak, self.peak_gradients = self.now, self.gradients

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@contextmanager
def counted_gradients(model: nn.Module, live: LiveBytes, passing: Collection[Tensor], reported: bool) -> Iterator[None]:
    """Watch the gradients of a pass.

    Args:
        passing: parameters whose gradient is removed at once, as if it were added to an existing one.
        reported: report the gradients of the others to `live`.
    """
    removed = set(passing)

    def count(parameter: Tensor) -> None:
        if parameter in removed:
            parameter.grad = None
        elif reported:
            live.gradients += parameter.nbytes

    handles = [p.register_post_accumulate_grad_hook(count) for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
