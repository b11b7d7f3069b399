"""Bytes that a compiled function moves on a GPU, and the kernels that it becomes, as the inductor plans them itself.

No GPU is needed: the graph is traced on the CPU, then the inductor plans its kernels for tensors on a GPU without data,
whose properties are those of an H100 (`_H100`). Bytes are its own count: every kernel reads each of its operands once,
also where it loops over a row twice. Launches are read in the Python code that it writes; no kernel is compiled.
"""

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
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


T = TypeVar("T")

# what the code of a graph calls without a launch
_FREE = {
    "assert_size_stride", "assert_alignment", "copy_if_misaligned", "reinterpret_tensor", "empty_strided_cuda",
    "get_raw_stream", "clear", "_DeviceGuard", "set_device", "view",
}  # fmt: skip


class _CountedError(Exception):
    """Ends compiling when everything is counted."""


def compiled_total(function: Callable[..., Any], *args: Tensor) -> Total:
    """What `torch.compile` makes of a function of tensors, which it may change in place; bytes are in `read`.

    Args:
        args: on the CPU; they give shapes and dtypes, and stay as they are.
    """

    def total(graph: GraphLowering) -> Total:
        kernels = [node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes]
        return Total(len(kernels), sum(kernels), 0)

    with planned(total) as (backend, found):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    (only,) = found
    return only


@contextmanager
def planned(look: Callable[[GraphLowering], T]) -> Iterator[tuple[Any, list[T]]]:
    """A backend for `torch.compile`, and what `look` finds in the plan of each graph, forward and backward.

    The compiled functions return tensors of the right shapes with any values.
    """
    found: list[T] = []

    def plan(graph: GraphLowering) -> Any:
        graph.init_wrapper_code()
        graph._update_scheduler()
        found.append(look(graph))
        raise _CountedError

    def inner(graph: fx.GraphModule, inputs: list[Any], **about: Any) -> Any:
        results = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        values = tree_map_only(fx.Node, lambda node: node.meta["val"], results)
        shapes = [None if value is None else (value.shape, value.stride(), value.dtype) for value in values]
        mode, before = detect_fake_mode(inputs), len(found)
        try:
            with _a_gpu(), V.set_fake_mode(mode):
                compile_fx_inner(graph, _moved_to_gpu(graph, inputs, mode), **about)
        except Exception:
            if len(found) == before:
                raise
        return make_boxed_func(
            lambda *_: [each and torch.empty_strided(each[0], each[1], dtype=each[2]) for each in shapes]
        )

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(_with_flash_attention(graph), inputs, inner_compile=inner)

    settings = config.patch(fx_graph_cache=False, compile_threads=1)  # no processes that compile kernels
    with patch.object(GraphLowering, "codegen", plan), settings:
        yield backend, found


def launches(graph: GraphLowering) -> Counter[str]:
    """Launches in the code that the inductor writes for a planned graph.

    Generated kernels are named "Triton"; products, attention and whatever else PyTorch does have the names of their
    functions, and count as one launch each.
    """
    graph.wrapper_code.push_codegened_graph(graph)
    graph.scheduler.codegen()
    code, _ = graph.wrapper_code.generate(graph.is_inference)
    graph.wrapper_code.pop_codegened_graph()
    return called(code.value)


def called(code: str) -> Counter[str]:
    """What the method `call` of such code launches; a function that is not known counts as a launch."""
    (method,) = (
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    if any(isinstance(node, (ast.For, ast.While, ast.If)) for node in ast.walk(method)):
        raise ValueError("The inductor's code branches: its launches cannot be counted by reading it.")
    functions = [ast.unparse(node.func) for node in ast.walk(method) if isinstance(node, ast.Call)]
    names = (each.removesuffix(".default").rpartition(".")[2] for each in functions)
    return Counter("Triton" if name == "run" else name for name in names if name not in _FREE)


def _with_flash_attention(graph: fx.GraphModule) -> fx.GraphModule:
    """Let a graph that is traced on the CPU call the attention that PyTorch takes on a GPU, in place."""
    for node in graph.graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            node.target = _flash_attention
    graph.recompile()
    return graph


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None:
        raise ValueError("Flash attention takes no mask.")
    call = torch.ops.aten._scaled_dot_product_flash_attention.default
    result: Tensor = call(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return result


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
        answer(torch.utils._triton, "triton_hash_with_backend", "")
        # PyTorch's methods look for a GPU in builds without CUDA, its operators do not
        own = torch.ops.aten
        stack.enter_context(patch.object(Tensor, "copy_", lambda x, y, wait=False: own.copy_.default(x, y, wait)))
        add_at = {own._unsafe_masked_index_put_accumulate.default: lambda x, *_: torch.empty_like(x)}
        stack.enter_context(patch.dict(torch._decomp.decomposition_table, add_at))
        yield
