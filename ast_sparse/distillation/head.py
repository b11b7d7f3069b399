"""The output head of a causal LM: which product makes its logits, and what the model does with them afterwards."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ast_sparse.errors import one_line
from ast_sparse.kernels.products import linear

_PROBE_LIMIT = 50.0  # logits are probed up to here, far into the cap of those models that have one
_PROBE_SMALL = 1e-6  # where tanh is its argument, to rounding


@dataclass(frozen=True)
class OutputHead:
    """`logits = scale · (weight · hidden + bias)`, and with `softcap` c the c · tanh(· / c) of that.

    Attributes:
        linear: the product.
        scale: Cohere's `logit_scale`, one over Granite's `logits_scaling`, ...
        softcap: Gemma's `final_logit_softcapping`, ...
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab]` of the hidden states `[..., hidden]` that the head is fed with."""
        logits = linear(hidden, self.linear.weight, self.linear.bias)
        logits = logits if self.scale == 1 else logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether it is still the head of the model, and nothing but FSDP watches or changes what it returns."""
        return self.linear is _output_embeddings(model) and not _has_hooks(self.linear)


class UnknownHeadError(Exception):
    """The way from hidden states to logits is not that of an `OutputHead`; the message says why."""


@contextmanager
def head_replaced(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, a model calls `forward` with the hidden states `[..., hidden]` in the place of its head.

    What the model makes of the result it takes for logits: they may be of any width.
    """
    head.forward = forward  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del head.forward


@contextmanager
def hidden_states(head: OutputHead) -> Iterator[list[Tensor]]:
    """Inside, a model that is called makes no logits; the list gets what its head was to be fed with."""
    captured: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with head_replaced(head.linear, forward):
        yield captured


@contextmanager
def loss_for_logits(
    model: nn.Module, head: OutputHead, loss_of: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Iterator[list[Tensor]]:
    """Inside, the output of `model` has the loss of its hidden states as `loss`, and None as `logits`.

    The loss is computed in the place of the head, inside the forward pass: a wrapper (DDP) then finds the head's weight
    used, autocast is what it is there, and sharded parameters are whole. It comes back through what the head returns,
    because the hooks of FSDP2 are there: they see the backward pass begin, and shard the head's gradient.

    Args:
        model: causal LM, not its wrapper; it may be called through one.
        loss_of: gets the hidden states `[batch, seq, hidden]`, returns a loss and a number of tokens.

    Yields:
        A list that gets the number of tokens.
    """
    computed: list[Tensor] = []
    tokens: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        loss, count = loss_of(hidden)
        tokens.append(count)
        computed.append(loss.expand(*hidden.shape[:-1], 1).clone())
        return computed[0]

    def put(module: nn.Module, args: Any, output: Any) -> Any:
        output["loss"], output["logits"] = computed.pop().flatten()[0].clone(), None  # FSDP2 warns of views
        return output

    handle = model.register_forward_hook(put, prepend=True)  # before hooks that reshard parameters
    try:
        with head_replaced(head.linear, forward):
            yield tokens
    finally:
        handle.remove()


@torch.no_grad()
def find_output_head(model: nn.Module) -> OutputHead:
    """What a causal LM does to make its logits, found by a forward pass of two tokens with a known head.

    Raises:
        UnknownHeadError: it is not an `OutputHead`, or the head is no plain layer that can be replaced.
    """
    head = _output_embeddings(model)
    if type(head) is not nn.Linear:
        raise UnknownHeadError(f"its head is {'not there' if head is None else type(head).__name__}")
    if _has_hooks(head):
        raise UnknownHeadError("its head has hooks")
    values = torch.linspace(-_PROBE_LIMIT, _PROBE_LIMIT, 2 * head.out_features, dtype=torch.float64)
    values[0], values[-1] = _PROBE_SMALL, _PROBE_LIMIT
    values = values.view(1, 2, -1).to(head.weight.device)
    calls = []

    def forward(hidden: Tensor) -> Tensor:
        calls.append(hidden.shape)
        return values

    logits = _probe(model, head, forward)
    if calls != [(1, 2, head.in_features)]:
        raise UnknownHeadError(f"its head is called with {[tuple(shape) for shape in calls]}")
    if not isinstance(logits, Tensor) or logits.shape != values.shape:
        raise UnknownHeadError("it changes the shape of its logits")
    logits = logits.double()
    found = _fit(head, float(logits[0, 0, 0]) / _PROBE_SMALL, float(logits[0, -1, -1]))
    expected = values * found.scale
    if found.softcap is not None:
        expected = found.softcap * torch.tanh(expected / found.softcap)
    if not torch.allclose(logits, expected, rtol=1e-5, atol=1e-6):
        raise UnknownHeadError("it changes its logits other than by a factor and a soft cap")
    return found


def _output_embeddings(model: nn.Module) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]


def _has_hooks(head: nn.Linear) -> bool:
    """Whether something else than its own forward decides what it returns, or sees it; not FSDP, which gathers it."""
    hooks = (*head._forward_hooks.values(), *head._forward_pre_hooks.values())
    return "forward" in vars(head) or any(not _is_of_fsdp(hook) for hook in hooks)


def _is_of_fsdp(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def _probe(model: nn.Module, head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The logits of two tokens in eval mode, without dropout's random numbers."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=head.weight.device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with head_replaced(head, forward):
            return getattr(model(input_ids=ids, use_cache=False), "logits", None)
    except Exception as error:  # whatever the code of a model raises that wants other inputs, or other logits
        raise UnknownHeadError(one_line(error)) from error
    finally:
        for module in training:
            module.training = True


def _fit(head: nn.Linear, scale: float, largest: float) -> OutputHead:
    """The head with this slope at zero, and this logit at `_PROBE_LIMIT`."""
    line = scale * _PROBE_LIMIT
    if not 0 < largest < line * (1 - 1e-5):
        return OutputHead(head, scale)
    low, high = largest, largest  # c · tanh(line / c) grows with c, from 0 to the line
    while high * math.tanh(line / high) < largest:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.tanh(line / middle) < largest else (low, middle)
    return OutputHead(head, scale, high)
