"""MLPs with a gate, `down(act(gate(x)) · up(x))`, recognised by running them, whatever their parts are called.

Most families have such an MLP; some compute gate and up by one product and split its output (Phi-3).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_SHAPE = (1, 3, 16)  # of the test input: small, with an even width


@dataclass(frozen=True)
class GatedMLP:
    """The names of the parts of a gated MLP.

    Attributes:
        projections: gate and up in the order in which they are called, or the one whose output has both as halves.
        gate: index of the one, or of the half, that the activation function is applied to.
        activation, down: the activation function, and the projection of the product.
    """

    projections: tuple[str, ...]
    gate: int
    activation: str
    down: str

    def product(self, activation: Callable[[Tensor], Tensor], *projected: Tensor) -> Tensor:
        """`act(gate) · up` from the outputs of the projections."""
        parts = projected if len(projected) == 2 else projected[0].chunk(2, dim=-1)
        return activation(parts[self.gate]) * parts[1 - self.gate]


class _Call(NamedTuple):
    name: str
    input: Tensor
    output: Tensor
    returned: Tensor  # the tensor itself; `output` is a copy that nothing changes in place


_tried: "WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], GatedMLP | None]]" = WeakKeyDictionary()


def find_gated_mlp(module: nn.Module) -> GatedMLP | None:
    """The parts of a module if it computes `down(act(gate(x)) · up(x))` and nothing else, or None.

    Its forward runs with other parts in place of its own: projections that return known tensors, and a copy of the
    activation function. So weights are not read and may be sharded or on the meta device, no hook runs, and gradients,
    random state and modes do not change. A module is tried only once as long as it has the same parts.
    """
    activation = _activation(module)
    if activation is None:
        return None
    parts = (type(module).forward, *((name, type(child)) for name, child in module.named_children()))
    known = _tried.get(module)
    if known is None or known[0] != parts:
        known = _tried[module] = (parts, _try(module, activation))
    return known[1]


def _activation(module: nn.Module) -> str | None:
    """The name of the only part without weights, if the others are two or three matrices; None otherwise."""
    children = module._modules
    if len(children) not in (3, 4) or any(isinstance(each, Tensor) for each in vars(module).values()):
        return None
    if module._parameters or module._buffers:  # a factor that is 1 now would not be noticed
        return None
    others = [name for name, child in children.items() if getattr(getattr(child, "weight", None), "ndim", 0) != 2]
    if len(others) != 1:
        return None
    child = children[others[0]]
    is_function = child is not None and not (child._modules or child._parameters or child._buffers)
    return others[0] if is_function else None


def _try(module: nn.Module, activation: str) -> GatedMLP | None:
    """The result if all tries agree: half precision would reveal a cast, and training mode anything random."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = {
            _try_once(module, activation, dtype, training)
            for dtype, training in itertools.product((torch.float32, torch.bfloat16), (False, True))
        }
    return found.pop() if len(found) == 1 else None


def _try_once(module: nn.Module, activation: str, dtype: torch.dtype, training: bool) -> GatedMLP | None:
    generator = torch.Generator().manual_seed(0)
    calls: list[_Call] = []

    def values(_: Any = None) -> Tensor:
        """Values of all magnitudes from 1e-3 to 1e4, so that clamping would show."""
        size, sign = (torch.rand(_SHAPE, generator=generator, device="cpu") for _ in range(2))
        return (10 ** (7 * size - 3) * (sign - 0.5).sign()).to(dtype)

    def part(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            before, output = x.clone(), function(x)
            calls.append(_Call(name, before, output.clone(), output))
            return output

        return call

    act = _copy(module._modules[activation], training).forward
    tried, x = _copy(module, training), values()
    tried._modules = {name: part(name, act if name == activation else values) for name in module._modules}
    try:
        result = tried.forward(x.clone())
        return _understood(calls, activation, act, x, result, set(module._modules))
    except Exception:  # whatever a module with other inputs or other kinds of parts raises
        return None


def _copy(module: Any, training: bool) -> Any:
    """A module with the same attributes, made without calling its class: FSDP's would make a different one."""
    made = object.__new__(type(module))
    vars(made).update(vars(module))
    made.training = training
    return made


def _understood(
    calls: list[_Call],
    activation: str,
    act: Callable[[Tensor], Tensor],
    x: Tensor,
    result: Any,
    names: set[str],
) -> GatedMLP | None:
    """The MLP whose parts were called like this and returned `result` for `x`; None if it computes something else."""
    *projections, down = (call for call in calls if call.name != activation)
    (gated,) = (call for call in calls if call.name == activation)
    if len(calls) != len(names) or {call.name for call in calls} != names or result is not down.returned:
        return None
    outputs = [call.output for call in projections]
    parts = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
    gates = [index for index, each in enumerate(parts) if _same(each, gated.input)]
    if not gates or not all(_same(call.input, x) for call in projections):
        return None
    mlp = GatedMLP(tuple(call.name for call in projections), gates[0], activation, down.name)
    return mlp if _same(mlp.product(act, *outputs), down.input) else None


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values; NaNs are equal."""
    same_kind = first.dtype == second.dtype and first.shape == second.shape
    return same_kind and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
