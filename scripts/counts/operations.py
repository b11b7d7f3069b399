"""Bytes that operations read and write in the memory of a GPU, and kernels that they launch, counted without a GPU.

`with Traffic() as traffic:` looks at every operation of PyTorch below autograd and autocast, so casts, the backward
pass and the accumulation of gradients count too. Rules:

- Views and allocations launch no kernel, nor does an operation whose results are empty. Every other one launches one;
  `SEVERAL` has those that are several kernels on CUDA, and are counted as these.
- A tensor counts with the memory that it covers: expanded dimensions once. One that is passed twice is read once.
- What is written in place is read and written. Results, `out=` and targets that are overwritten (`OVERWRITTEN`) are
  only written.
- Lookups (`gather`, `embedding`, `index`) read their index and as many entries as they return. What is put at an index
  is written there and nowhere else; what is added there is read too. Gradients of lookups fill their result first.
- A kernel reads each operand once, also where it needs two passes and the caches are too small. Where PyTorch launches
  a number of kernels that depends on sizes (`nonzero`, `sort`), one is counted: the true numbers are not lower.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

NO_KERNEL = {
    "_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "empty_permuted", "resize_", "set_", "lift", "lift_fresh", "_local_scalar_dense", "_fused_sdp_choice",
    "record_stream",
}  # fmt: skip
OVERWRITTEN = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
LOOKUPS = {"gather", "index", "index_select", "embedding", "nll_loss_forward"}  # the first tensor is looked up
PLACED = {"scatter_", "scatter_add_", "index_put_", "_index_put_impl_", "index_add_", "index_copy_", "index_fill_"}
FILLED = {"embedding_dense_backward", "nll_loss_backward", "slice_backward", "select_backward"}  # first with zeros
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "convolution", "convolution_backward"}
ATTENTION = "_scaled_dot_product"  # what the names of its kernels begin with


@dataclass(frozen=True)
class Total:
    """Launches, and bytes."""

    kernels: int
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Traffic(TorchDispatchMode):
    """A context that counts; it can be entered several times, and adds up.

    Attributes:
        kernels: launches, by the name of the operation.
        read: bytes, by the name of the operation.
        written: bytes, by the name of the operation.
        triton: launches of Triton's kernels among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.triton = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, given = function.overloadpacket.__name__, kwargs or {}
        if function in SEVERAL:
            with self:  # its operations come here again
                return SEVERAL[function](*args, **given)
        result = function(*args, **given)
        if name not in NO_KERNEL and not function.is_view:
            self.add(name, _launch(function, name, args, given, result))
        return result

    def add(self, name: str, launch: Total) -> None:
        """Count launches under a name."""
        if launch.kernels == 0:
            return
        self.kernels[name] += launch.kernels
        self.read[name] += launch.read
        self.written[name] += launch.written

    def total(self, counts: Callable[[str], bool] = lambda name: True) -> Total:
        """The sum over the operations whose name `counts`."""
        names = [name for name in self.kernels if counts(name)]
        kernels, read, written = (sum(each[name] for name in names) for each in (self.kernels, self.read, self.written))
        return Total(kernels, read, written)


def is_arithmetic(name: str) -> bool:
    """Whether an operation is a product, a convolution or attention."""
    return name in PRODUCTS or name.startswith(ATTENTION)


def covered(tensor: Tensor) -> int:
    """Bytes of memory that a strided tensor covers; those of an expanded dimension once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(1 if stride == 0 and size else size for size, stride in sizes) * tensor.element_size()


def _launch(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Total:
    """What one operation launches, after it ran."""
    arguments: list[Tensor] = []
    changed: list[Tensor] = []
    overwritten: list[Tensor] = []
    for position, argument in enumerate(function._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        target = arguments
        if is_changed:
            target = overwritten if argument.is_out or name in OVERWRITTEN else changed
        target += _tensors(value)
    results = _tensors(result)
    if not any(each.numel() for each in (*results, *changed, *overwritten)):
        return Total(0, 0, 0)
    if name in PLACED:
        return _placed(name, changed[0], arguments, kwargs.get("accumulate", args[3] if len(args) > 3 else False))
    read = 0 if name.endswith("_like") or name.startswith("new_") else _bytes(arguments)
    if name in LOOKUPS:
        source, index = arguments[0], arguments[1]
        entries = index.numel() if name == "nll_loss_forward" else results[0].numel()
        read += min(entries * source.element_size() - covered(source), 0)
    written = _bytes([*results, *changed, *overwritten])
    if name in FILLED:  # the gradient is added to a part of the zeros
        touched = (
            arguments[2].numel() * results[0].element_size() if name == "nll_loss_backward" else _bytes(arguments[:1])
        )
        read -= covered(arguments[1]) if name == "nll_loss_backward" else 0  # log probabilities: only their sizes
        return Total(2, read, written + touched)
    return Total(1, read + _bytes(changed), written)


def _placed(name: str, target: Tensor, others: list[Tensor], accumulates: Any) -> Total:
    """An operation that changes a target at an index only."""
    index = others[0]
    if name in ("index_put_", "_index_put_impl_"):
        touched = covered(target[tuple(others[:-1])]) if len(others) > 1 else 0
    elif name in ("index_add_", "index_copy_", "index_fill_"):
        touched = index.numel() * covered(target) // max(target.shape[0], 1)
    else:
        touched = index.numel() * target.element_size()
    adds = "add" in name or ("put" in name and bool(accumulates))
    return Total(1, _bytes(others) + (touched if adds else 0), touched)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors cover, each once, however often it is named."""
    found = {(each.data_ptr(), each.shape, each.stride(), each.dtype): covered(each) for each in tensors}
    return sum(found.values())


def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    """As in PyTorch's `ReduceOps.cpp`."""
    largest = x.amax(dim, keepdim=True)
    squeezed = largest if keepdim else largest.squeeze(dim)
    squeezed.masked_fill_(squeezed.abs() == float("inf"), 0)
    return (x - largest).exp_().sum(dim, keepdim).log_().add_(squeezed)


def _on_a_copy(in_place: Any) -> Callable[..., Tensor]:
    """A copy of the first argument, which is then changed."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = x.clone()
        in_place(copy, *args, **kwargs)
        return copy

    return call


SEVERAL: dict[Any, Callable[..., Tensor]] = {
    aten.logsumexp.default: _logsumexp,
    aten.masked_fill.Scalar: _on_a_copy(aten.masked_fill_.Scalar),
    aten.masked_fill.Tensor: _on_a_copy(aten.masked_fill_.Tensor),
    aten.scatter.src: _on_a_copy(aten.scatter_.src),
    aten.scatter.value: _on_a_copy(aten.scatter_.value),
    aten.scatter_add.default: _on_a_copy(aten.scatter_add_.default),
    aten.index_add.default: _on_a_copy(aten.index_add_.default),
    aten.index_put.default: _on_a_copy(aten.index_put_.default),
}
