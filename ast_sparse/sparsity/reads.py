"""Which weights a model reads directly, bypassing the forward of their layer: a mask would have no effect on them."""

import copy
import importlib.util
import inspect
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ast_sparse.sparsity.layers import SparseLayer
from ast_sparse.storage.model_kind import without_cache

_TOKENS = 8
_TORCH_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
# These take dtype, device or shape from a tensor, but none of its values.
_LIKE = (
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "type_as", "expand_as"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "view_as", "reshape_as"),
)
_FUSED = ("mamba_ssm",)  # packages with kernels that take weights of linear layers as arguments
_MOST_KNOWN = 64  # structures that are remembered
_KNOWN: dict[Hashable, set[str]] = {}
# What differs between a model that was built and the same one loaded. The copy that runs is in evaluation mode without
# data; its dtype does not count; hub kernels replace `forward` itself, and transformers `tie_weights` while it loads.
_OF_NO_FORWARD = frozenset(
    (
        *("training", "name_or_path", "_name_or_path", "architectures", "transformers_version", "dtype"),
        *("quantization_config", "quantization_method", "is_quantized", "_is_hf_initialized", "_use_kernels"),
        "tie_weights",
    )
)
_SOURCE = re.compile(r"\bself\.(\w+)\.weight\b(?!\s*\.\s*(?:dtype|device|shape|size|is_meta|requires_grad)\b)")
_DTYPE_IN_SOURCE = re.compile(r"\bself\.(\w+)\.weight\s*\.\s*dtype\b")
_GET_DTYPE = cast(Any, Tensor.dtype).__get__


def read_past_forward(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Find the layers whose `weight` is an operand outside their own forward, as in Mamba's `dt_proj`.

    Runs a copy of the model on a few fake tokens without data, so that a plan on the meta device and a run find the
    same. If the model cannot run like that, and for fused kernels, its source code decides. The result is
    remembered for models of the same structure.

    Args:
        layers: the layers to check, by name.

    Returns:
        By name of the layer, the class of the module that contains it.
    """
    key = _structure(model)
    found = _KNOWN.get(key) if key is not None else None
    if found is None:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
        found = _find(model, {**linears, **layers} if key is not None else layers)  # known for any selection
        if key is not None:
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.pop(next(iter(_KNOWN)))
            _KNOWN[key] = found
    return {name: type(_owner(model, name)).__name__ for name in layers if name in found}


def dtype_asked(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """Find the layers whose weight gives its dtype to something outside their own forward.

    Indexers of sparse attention (DeepSeek-V3.2) cast the inputs of a layer to it, which destroys them if the weight is
    stored in integers.
    """
    watch = _watched(model, layers)
    return {name for name in layers if _in_source(model, name, _DTYPE_IN_SOURCE)} if watch is None else watch.asked


def _find(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    found = _operands(model, layers)
    if found is None or any(importlib.util.find_spec(package) for package in _FUSED):
        found = (found or set()) | {name for name in layers if _in_source(model, name)}
    return found


def _structure(model: nn.Module) -> Hashable | None:
    """What the result depends on, so that a model of the same structure need not run again; None if that is unclear.

    It names every module with its class and that class's functions, its plain attributes, and the shapes of its
    parameters and buffers and which of them are shared. A module with hooks, or with a method of its own, is unclear.
    A sparse layer counts as the dense one that it was. Where a model was loaded from makes no difference.
    """
    seen: dict[int, int] = {}
    parts: list[Hashable] = [_settings(getattr(model, "config", None))]
    inside_sparse: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(inside_sparse):
            continue  # SLoRB
        own, kind, tensors = vars(module), type(module), {**module._parameters, **module._buffers}
        has_method = "forward" in own or any(inspect.ismethod(value) for value in own.values())
        if has_method or module._forward_hooks or module._forward_pre_hooks:
            return None
        plain = {key: value for key, value in own.items() if isinstance(value, bool | int | float | str)}
        if isinstance(module, SparseLayer):
            kind, inside_sparse = module.dense_class, (*inside_sparse, f"{name}.")
            tensors = {key: value for key, value in tensors.items() if key in ("weight", "bias")}
            plain = {key: value for key, value in plain.items() if key not in SparseLayer.__annotations__}
        shapes = tuple(
            (key, None if value is None else (seen.setdefault(id(value), len(seen)), value.shape))
            for key, value in tensors.items()
        )
        attributes = tuple(sorted((key, value) for key, value in plain.items() if key not in _OF_NO_FORWARD))
        parts.append((name, kind, _functions(kind), attributes, shapes))
    return tuple(parts)


def _settings(config: Any) -> str:
    """A model's configuration, as text; a file has its settings in another order."""
    if not isinstance(config, PreTrainedConfig):
        return repr(config)
    settings = {key: value for key, value in config.to_dict().items() if key not in _OF_NO_FORWARD}
    return json.dumps(settings, sort_keys=True, default=repr)


def _functions(kind: type) -> tuple[Callable[..., Any], ...]:
    """The functions of a class and its bases outside torch: a patched one makes another structure."""
    bases = (base for base in kind.__mro__ if not base.__module__.startswith("torch."))
    return tuple(
        value
        for base in bases
        for key, value in vars(base).items()
        if inspect.isfunction(value) and key not in _OF_NO_FORWARD
    )


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _in_source(model: nn.Module, name: str, pattern: re.Pattern[str] = _SOURCE) -> bool:
    """Whether a method of the owner that may run in its forward mentions `self.<layer>.weight`."""
    child = name.rpartition(".")[2]
    for kind in type(_owner(model, name)).__mro__:
        if kind.__module__.startswith("torch."):
            continue
        for key, method in vars(kind).items():
            if inspect.isfunction(method) and "init" not in key and "reset" not in key:
                with suppress(OSError, TypeError):
                    if child in pattern.findall(inspect.getsource(method)):
                        return True
    return False


def _operands(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str] | None:
    """Names of the layers whose weight is used outside; None if a forward pass without data is not possible."""
    watch = _watched(model, layers)
    return None if watch is None else watch.found


@torch.no_grad()
def _watched(model: nn.Module, layers: Mapping[str, nn.Module]) -> "_Watch | None":
    """What was seen in a forward pass without data; None if that is not possible."""
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        shadow = _without_data(model, mode)
        watch = _Watch({name: shadow.get_submodule(name) for name in layers})
        with torch.random.fork_rng(devices=[]), _quiet(), mode, _EveryPosition(), watch.own_forwards(shadow), watch:
            shadow(input_ids=torch.zeros((1, _TOKENS), dtype=torch.long), **without_cache(model))
    except Exception:  # whatever a model raises if it needs data or other inputs
        return None
    return watch


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the traceback that torch logs if an operation does not run on fake tensors."""
    before, _TORCH_LOGGER.disabled = _TORCH_LOGGER.disabled, True
    try:
        yield
    finally:
        _TORCH_LOGGER.disabled = before


def _without_data(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model whose tensors have a shape and no data."""
    memo: dict[int, Any] = {}
    plain = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    with mode:
        for tensor in (*model.parameters(), *model.buffers(), *plain):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    shadow = copy.deepcopy(model, memo).eval()
    with suppress(Exception):  # other kinds of attention read the values of a mask
        cast(Any, shadow).set_attn_implementation("eager")
    with suppress(Exception):  # and other implementations of experts read the routing
        cast(Any, shadow).set_experts_implementation("batched_mm")
    return shadow


class _EveryPosition(TorchDispatchMode):
    """Treats every position as selected where the result would depend on data, so that all experts run."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1
        return func(*args, **(kwargs or {}))


class _Watch(TorchFunctionMode):
    """Records the layers whose weight is an operand of a torch function while none of their forwards runs.

    Attributes:
        found: their names.
        asked: the names of those whose weight is only asked for its dtype, or lends it to another tensor.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.asked: set[str] = set()
        self._names: dict[int, list[str]] = {}
        for name, layer in layers.items():
            self._names.setdefault(id(layer.weight), []).append(name)
        self._inside: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        used = args[:1] if name == "to" else (args, kwargs)
        if func == _GET_DTYPE or name == "to" or name in _LIKE:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._names and not self._inside[id(leaf)]:
                    self.asked.update(self._names[id(leaf)])
        if name not in _LIKE and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            for leaf in tree_leaves(used):
                if id(leaf) in self._names and not self._inside[id(leaf)] and result is not leaf:  # scaled in place
                    self.found.update(self._names[id(leaf)])
        return result

    @contextmanager
    def own_forwards(self, shadow: nn.Module) -> Iterator[None]:
        """Track when a layer runs, or another one with its weight, however it is called."""
        for module in shadow.modules():
            weight = module._parameters.get("weight")
            if id(weight) in self._names:
                vars(module)["forward"] = self._marked(id(weight), cast(Callable[..., Any], module.forward))
        yield  # no clean-up: the model is a copy

    def _marked(self, key: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inside[key] += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self._inside[key] -= 1

        return run
