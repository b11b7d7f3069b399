"""Where a block can take back a scale of input columns, so that it computes the same (AWQ, Lin et al. 2024).

Linear layers that read one tensor can have their columns multiplied by s if what makes this tensor is divided by s: a
norm, or the rows of a layer before it. Candidates are found by running the block, and a fold is used only if the block
then still computes the same, so no list of model families is needed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ast_sparse.sparsity.layers import group_dim_of, out_by_in

SLORB_S, SLORB_X = "slorb_S", "slorb_X"  # buffers of a layer while it is rounded
_CLOSE = 1e-4  # largest relative difference of a channel, which float32 rounding does not reach


class Fold(Protocol):
    """What makes the input of a group of layers, and how it is divided by a scale."""

    modules: tuple[nn.Module, ...]

    def tie(self, squares: Tensor) -> Tensor:
        """Mean squares `[in]` of the inputs, averaged over the columns that must have one scale."""

    def exact(self, scale: Tensor) -> Tensor:
        """The scale `[in]` that results if the divided weights are rounded to the dtype they are written in."""

    def divide(self, scale: Tensor) -> None:
        """Divide by a scale that `exact` gave, in place."""


@dataclass
class NormFold:
    """The weight of a norm; `offset` is 1 where it computes with `1 + w` (Gemma)."""

    norm: nn.Module
    offset: int
    dtype: torch.dtype
    modules: tuple[nn.Module, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = (self.norm,)

    def _divided(self, scale: Tensor) -> Tensor:
        weight: Any = self.norm.weight
        return ((weight + self.offset) / scale - self.offset).to(self.dtype).to(weight.dtype)

    def tie(self, squares: Tensor) -> Tensor:
        return squares

    def exact(self, scale: Tensor) -> Tensor:
        weight: Any = self.norm.weight
        before, after = weight + self.offset, self._divided(scale) + self.offset
        usable = (after != 0) & (before != 0) & after.isfinite()
        return torch.where(usable, before / torch.where(usable, after, 1), 1)

    def divide(self, scale: Tensor) -> None:
        weight: Any = self.norm.weight
        bias: Any = getattr(self.norm, "bias", None)
        weight.copy_(torch.where(scale == 1, weight, self._divided(scale)))
        if bias is not None:
            bias.div_(scale)


@dataclass
class RowsFold:
    """The last rows of a layer: value before output projection, up before down.

    `heads` (key-value heads, queries per head, head size) is set if each of the rows makes several columns, as in
    attention with grouped queries.
    """

    layer: nn.Module
    count: int
    heads: tuple[int, int, int] | None
    modules: tuple[nn.Module, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = (self.layer,)

    def tie(self, squares: Tensor) -> Tensor:
        if self.heads is None:
            return squares
        tied = squares.view(self.heads).mean(1, keepdim=True)
        return tied.expand(self.heads).reshape(-1)

    def exact(self, scale: Tensor) -> Tensor:
        return scale

    def divide(self, scale: Tensor) -> None:
        rows = scale if self.heads is None else scale.view(self.heads)[:, 0].reshape(-1)
        _weight(self.layer)[-self.count :] /= rows[:, None]
        others: list[Tensor | None] = [getattr(self.layer, key, None) for key in ("bias", SLORB_S)]
        for tensor in others:
            if tensor is not None:
                tensor[-self.count :] /= rows if tensor.dim() == 1 else rows[:, None]


@dataclass(frozen=True)
class Group:
    """Linear layers of a block that read the same tensor, by their name in the block, and the fold, if there is one."""

    layers: dict[str, nn.Module]
    fold: Fold | None


def multiply_columns(layer: nn.Module, scale: Tensor) -> None:
    """Multiply the columns of a layer, and of its SLoRB, by a scale `[in]`, in place."""
    _weight(layer).mul_(scale)
    x: Tensor | None = getattr(layer, SLORB_X, None)
    if x is not None:
        x.mul_(scale)


@torch.no_grad()
def find_groups(
    block: nn.Module,
    run: Callable[[], tuple[Tensor, Tensor]],
    shared: Collection[nn.Module],
    dtypes: Mapping[nn.Module, torch.dtype],
    attention: tuple[int, int] | None,
) -> list[Group]:
    """The groups of a block in the order in which they run; its weights are the same afterwards.

    Args:
        run: runs the block on a sample, and returns its hidden states before and after, both `[1, tokens, width]`.
        shared: modules that have a weight of another module, or run more than once: they are in no fold.
        dtypes: by norm, the dtype in which its weight is written.
        attention: number of key-value heads and head size, if the model has them.
    """
    with _watched(block) as trace:
        before, after = run()
    usable = {name: layer for name, layer in trace.linears.items() if trace.calls[name] == 1}
    by_input: dict[tuple[int, int], dict[str, nn.Module]] = {}
    for name, layer in usable.items():
        by_input.setdefault(_key(trace.inputs[name]), {})[name] = layer
    groups = []
    for layers in by_input.values():
        fold = None
        if not any(layer in shared for layer in layers.values()):
            for candidate in _candidates(layers, trace, dtypes, attention):
                if not any(each in shared for each in candidate.modules) and _fits(
                    block, candidate, layers, trace, run, (before, after)
                ):
                    fold = candidate
                    break
        groups.append(Group(layers, fold))
    return groups


@dataclass
class _Trace:
    """What a run of a block showed; tensors are kept, so that no memory is used twice."""

    linears: dict[str, nn.Module] = field(default_factory=dict)  # in the order in which they ran
    inputs: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    norms: dict[str, tuple[nn.Module, Tensor]] = field(default_factory=dict)


@contextmanager
def _watched(block: nn.Module) -> Iterator[_Trace]:
    trace = _Trace()

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Linear | Conv1D):
                trace.linears.setdefault(name, module)
                trace.inputs[name] = args[0]
                trace.calls[name] = trace.calls.get(name, 0) + 1
            elif isinstance(output, Tensor):
                trace.norms[name] = module, output

        return see

    watched = [
        (name, module)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        or (getattr(getattr(module, "weight", None), "ndim", 0) == 1 and not module._modules)
    ]
    handles = [module.register_forward_hook(hook(name)) for name, module in watched]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _weight(layer: Any) -> Tensor:
    """The weight of a layer as a view `[out, in]`."""
    return out_by_in(layer.weight, group_dim_of(layer))


def _key(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _candidates(
    layers: dict[str, nn.Module],
    trace: _Trace,
    dtypes: Mapping[nn.Module, torch.dtype],
    attention: tuple[int, int] | None,
) -> Iterator[Fold]:
    first = next(iter(layers))
    key, width = _key(trace.inputs[first]), trace.inputs[first].shape[-1]
    for norm, output in trace.norms.values():
        if _key(output) == key and len(norm.weight) == width:  # type: ignore[arg-type]
            yield from (NormFold(norm, offset, dtypes[norm]) for offset in (0, 1))
    parent = first.rpartition(".")[0]
    for name, layer in trace.linears.items():
        if name == first:
            break  # only layers that ran before
        if name.rpartition(".")[0] != parent or name in layers:
            continue
        rows = len(_weight(layer))
        if rows >= width:
            yield RowsFold(layer, width, None)
        if attention is not None:
            kv_heads, size = attention
            count = kv_heads * size
            if count < width and width % count == 0 and rows >= count:
                yield RowsFold(layer, count, (kv_heads, width // count, size))


def _fits(
    block: nn.Module,
    fold: Fold,
    layers: dict[str, nn.Module],
    trace: _Trace,
    run: Callable[[], tuple[Tensor, Tensor]],
    expected: tuple[Tensor, Tensor],
) -> bool:
    """Whether the block computes the same with some scale, and its layers get their inputs divided by it."""
    first = next(iter(layers))
    old = trace.inputs[first]
    if not old.numel():
        return False  # an expert that this sample does not reach
    width = old.shape[-1]
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(6 * torch.rand(width, generator=generator) - 3)  # 0.05 to 20: a clamp shows too (OLMo)
    scale = fold.tie(spread.to(old.device)).to(torch.float32)
    changed = [*fold.modules, *layers.values()]
    saved = [(tensor, tensor.clone()) for module in changed for tensor in _tensors(module)]
    try:
        scale = fold.exact(scale)
        fold.divide(scale)
        for layer in layers.values():
            multiply_columns(layer, scale)
        with _watched(block) as found:
            before, after = run()
    finally:
        for tensor, value in saved:
            tensor.copy_(value)
    for name, inputs in found.inputs.items():  # also of the layers that must not notice
        if not _close(inputs * scale if name in layers else inputs, trace.inputs[name]):
            return False
    floor = 1e-6 * expected[1].float().flatten(0, -2).norm(dim=0)
    return _close(after - before, expected[1] - expected[0], floor)


def _tensors(module: nn.Module) -> list[Tensor]:
    found = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in found if tensor is not None]


def _close(found: Tensor, wanted: Tensor, floor: Tensor | float = 0.0) -> bool:
    """Whether no channel differs by more than rounding, in the norm over the tokens."""
    if found.shape != wanted.shape:
        return False
    found, wanted = found.float().flatten(0, -2), wanted.float().flatten(0, -2)
    size = wanted.norm(dim=0)
    return bool(((found - wanted).norm(dim=0) <= _CLOSE * (size + 1e-2 * size.mean()) + floor).all())
