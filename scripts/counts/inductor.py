"""Bytes that a compiled function moves on a GPU, and the kernels that it becomes, as the inductor counts them itself.

No GPU is needed: the graph is traced on the CPU, then the inductor plans its kernels for tensors on a GPU without data,
whose properties are those of an H100 (`_H100`). It stops before it writes code. Every kernel reads each of its operands
once, also where it loops over a row twice.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map_only

from scripts.counts.operations import Total

_H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30, gcnArchName="",
    L2_cache_size=50 << 20, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)  # fmt: skip


class _CountedError(Exception):
    """Ends compiling when everything is counted."""


def compiled_total(function: Callable[..., Any], *args: Tensor) -> Total:
    """What `torch.compile` makes of a function of tensors, which it may change in place; bytes are in `read`.

    Args:
        args: on the CPU; they give shapes and dtypes, and stay as they are.
    """
    found: list[Total] = []

    def count(graph: GraphLowering) -> Any:
        graph.init_wrapper_code()
        graph._update_scheduler()
        kernels = [node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes]
        found.append(Total(len(kernels), sum(kernels), 0))
        raise _CountedError

    def inner(graph: fx.GraphModule, inputs: list[Any], **about: Any) -> Any:
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        values = tree_map_only(fx.Node, lambda node: node.meta["val"], results)
        shapes = [None if value is None else (value.shape, value.dtype) for value in values]
        mode = detect_fake_mode(inputs)
        on_gpu = _moved_to_gpu(graph, inputs, mode)
        try:
            with _a_gpu(), V.set_fake_mode(mode):
                compile_fx_inner(graph, on_gpu, **about)
        except Exception:
            if not found:
                raise
        return make_boxed_func(lambda *_: [each and torch.zeros(each[0], dtype=each[1]) for each in shapes])

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=inner)

    with patch.object(GraphLowering, "codegen", count), config.patch(fx_graph_cache=False):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    (total,) = found
    return total


def _moved_to_gpu(graph: fx.GraphModule, inputs: list[Tensor], mode: Any) -> list[Tensor]:
    """Let a graph of tensors without data be one of tensors on a GPU, in place; its new inputs."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    graph.recompile()
    with mode:
        on_gpu = [torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="cuda") for each in inputs]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*on_gpu)
    return on_gpu


@contextmanager
def _a_gpu() -> Iterator[None]:
    """Inside, the inductor finds an H100."""
    answers: dict[str, Any] = {
        "get_device_properties": _H100, "get_compute_capability": 90, "is_available": True, "current_device": 0,
        "is_bf16_supported": True, "synchronize": None,
    }  # fmt: skip
    with ExitStack() as stack:

        def answer(owner: Any, name: str, value: Any) -> None:
            call = lambda *args, **kwargs: value  # noqa: E731
            stack.enter_context(patch.object(owner, name, staticmethod(call) if isinstance(owner, type) else call))

        for name, value in answers.items():
            answer(CudaInterface, name, value)
        for name in ("get_device_properties", "current_device"):
            answer(CudaInterface.Worker, name, answers[name])
            answer(torch.cuda, name, answers[name])
        answer(torch.cuda, "get_device_capability", (9, 0))
        answer(torch.cuda, "device_count", 1)
        answer(torch._inductor.scheduler, "has_triton", True)
        yield
