"""Counts what would make the host wait for a GPU, on a CPU: reading a value back, and sizes that depend on values."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# each of these copies a value to the host, to return it or to know the size of its result
_WAITING = {
    _aten._local_scalar_dense, _aten.item, _aten.is_nonzero, _aten.equal, _aten.nonzero, _aten.masked_select,
    _aten._unique2, _aten.unique_consecutive, _aten.unique_dim, _aten.bincount, _aten.histc,
}  # fmt: skip
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
# on a CPU these read memory without an operation
_READING = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
_MADE_ON_THE_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}  # and copied from there


class Syncs(TorchDispatchMode):
    """Inside, `found` grows by a line for everything that would wait for a GPU.

    Args:
        stays_on_the_host: whether a tensor is in host memory in a run on a GPU too (step counts of an optimizer).
    """

    def __init__(self, stays_on_the_host: Callable[[Tensor], bool] = lambda tensor: False) -> None:
        super().__init__()
        self.found: list[str] = []
        self._stays = stays_on_the_host
        self._calls = _Calls(self)

    def __enter__(self) -> "Syncs":
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._calls.__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        tensors = [each for each in args if isinstance(each, Tensor)]
        if (packet in _WAITING or (packet in _INDEXING and _has_bools(args[1]))) and not all(map(self._stays, tensors)):
            self.note(str(packet))
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        """Add a line with the places that called it."""
        frames = [each for each in traceback.extract_stack() if "/torch/" not in each.filename]
        places = [f"{each.filename.split('site-packages/')[-1]}:{each.lineno} {each.name}" for each in frames[-6:-2]]
        self.found.append(f"{what}  {' > '.join(places)}")


class _Calls(TorchFunctionMode):
    """Sees what does not become an operation on a CPU."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_made = func in _MADE_ON_THE_HOST and not isinstance(args[0], Tensor) and (kwargs or {}).get("device")
        if func in _READING or is_made:
            self._syncs.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _has_bools(indices: Any) -> bool:
    return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices)


@contextmanager
def outside_micro_batches(run: Any, syncs: Syncs) -> Iterator[list[list[str]]]:
    """A list that is filled with what each `training_step` of a run adds to `syncs.found`, which then has the rest."""
    by_batch: list[list[str]] = []
    inner = run.training_step

    def counted(*args: Any) -> Any:
        before, syncs.found = syncs.found, []
        try:
            return inner(*args)
        finally:
            by_batch.append(syncs.found)
            syncs.found = before

    run.training_step = counted
    try:
        yield by_batch
    finally:
        del run.training_step
