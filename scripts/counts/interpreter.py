"""Launches of Triton kernels, and the bytes that they load and store, counted in Triton's interpreter.

The process must have been started with TRITON_INTERPRET=1. In one load or store of one program an address counts once,
and masked ones do not count; what another load of the same program reads again counts again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from scripts.counts.operations import Total, Traffic


@contextmanager
def counted_kernels(traffic: Traffic) -> Iterator[None]:
    """Inside, launches are added to `traffic`, while it counts, under the names of the kernels."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    moved = {"read": 0, "written": 0}
    launch = GridExecutor.__call__

    def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
        moved.update(read=0, written=0)
        counts = traffic in _get_current_dispatch_mode_stack()
        with _disable_current_modes():  # what the interpreter itself does with the tensors
            result = launch(executor, *args, **kwargs)
        if counts:
            traffic.triton += 1
            traffic.add(executor.fn.__name__, Total(1, **moved))
        return result

    def counting(method: Any, pointers: int, mask: int, ways: Sequence[str]) -> Any:
        def call(builder: Any, *args: Any, **kwargs: Any) -> Any:
            at, inside = args[pointers], args[mask].data.astype(bool)
            addresses = np.unique(np.broadcast_to(at.data, inside.shape)[inside])
            for way in ways:
                moved[way] += len(addresses) * max(at.get_element_ty().primitive_bitwidth // 8, 1)
            return method(builder, *args, **kwargs)

        return call

    # positions of pointers and mask; unmasked loads and stores, blocks and descriptors go through these
    patches: dict[str, tuple[int, int, Sequence[str]]] = {
        "create_masked_load": (0, 1, ["read"]),
        "create_masked_store": (0, 2, ["written"]),
        "create_atomic_rmw": (1, 3, ["read", "written"]),
    }
    kept = {name: getattr(InterpreterBuilder, name) for name in patches}
    try:
        GridExecutor.__call__ = launched
        for name, about in patches.items():
            setattr(InterpreterBuilder, name, counting(kept[name], *about))
        yield
    finally:
        GridExecutor.__call__ = launch
        for name, method in kept.items():
            setattr(InterpreterBuilder, name, method)
