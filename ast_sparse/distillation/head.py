"""The output head of a causal LM: the linear layer that makes the logits, and what the model does to them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ast_sparse.distributed.pieces import reshard
from ast_sparse.errors import UserError, one_line
from ast_sparse.kernels.products import linear, product
from ast_sparse.storage.model_kind import without_cache

_PROBE_LIMIT = 50.0  # the largest probed logit, where the soft cap of models that have one is clearly visible
_PROBE_SMALL = 1e-6  # a value x with tanh(x) = x up to rounding


@dataclass(frozen=True)
class OutputHead:
    """`logits = scale · (weight · hidden + bias)`, and with `softcap` c, c · tanh(· / c) of that.

    Attributes:
        linear: the layer with weight and bias.
        scale: Cohere's `logit_scale`, one over Granite's `logits_scaling`, ...
        softcap: Gemma's `final_logit_softcapping`, ...
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab]` from the head's inputs, hidden states `[..., hidden]`."""
        logits = linear(hidden, self.linear.weight, self.linear.bias)
        logits = logits if self.scale == 1 else logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def belongs_to(self, model: nn.Module) -> bool:
        """Whether this is still the head of the model, and nothing but FSDP observes or changes its output."""
        return self.linear is _output_embeddings(model) and not _has_hooks(self.linear)


class HeadProducts:
    """The products of a head for some tokens at a time, in one buffer, in the dtype of the head or of autocast.

    Args:
        size: the most tokens.
        autocast: the dtype of autocast, or None.
        align: entries that the stride of a row is a multiple of.
    """

    def __init__(self, head: OutputHead, size: int, autocast: torch.dtype | None = None, align: int = 1) -> None:
        weight, bias = head.linear.weight.detach(), head.linear.bias
        self.head = head
        self.weight = weight.to(autocast or weight.dtype)
        self.bias = None if bias is None else (bias.detach() * head.scale).to(self.weight.dtype)
        self.buffer = self.weight.new_empty(size, -(-len(weight) // align) * align)[:, : len(weight)]

    def inputs(self, hidden: Tensor) -> Tensor:
        """Hidden states `[rows, hidden]` in the dtype of the product, with the scale of the head."""
        hidden = hidden.to(self.weight.dtype)
        return hidden if self.head.scale == 1 else hidden * self.head.scale

    def products(self, inputs: Tensor) -> Tensor:
        """`[rows, vocab]`, the logits before the soft cap; valid until the next call."""
        out = self.buffer[: len(inputs)]
        if self.bias is not None and out.is_cuda:  # in one kernel
            return torch.addmm(self.bias, inputs, self.weight.t(), out=out)
        products = product(inputs, self.weight.t(), out=out)
        return products if self.bias is None else products.add_(self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[rows, vocab]`; valid until the next call."""
        products, softcap = self.products(self.inputs(hidden)), self.head.softcap
        return products if softcap is None else products.div_(softcap).tanh_().mul_(softcap)


class UnknownHeadError(Exception):
    """The model does not compute its logits as an `OutputHead` does; the message says why."""


@contextmanager
def head_replaced(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In the block, the model calls `forward` instead of its head, with the hidden states `[..., hidden]`.

    The model treats the result as logits; they may have any width.
    """
    head.forward = forward  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del head.forward


@contextmanager
def hidden_states(head: OutputHead) -> Iterator[list[Tensor]]:
    """In the block, the model makes no logits; the inputs of its head are put into the list."""
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
    """In the block, the output of `model` has the loss of its hidden states as `loss`, and None as `logits`.

    The loss is computed in place of the head, inside the forward pass: there a wrapper (DDP) sees that the head's
    weight is used, autocast is as usual, and sharded parameters are gathered. The loss is returned through the head's
    output, which has the hooks of FSDP2 that run when the backward pass begins and shard the head's gradient.

    Args:
        model: causal LM, not its wrapper; it may be called through a wrapper.
        loss_of: takes the hidden states `[batch, seq, hidden]`, returns a loss and a number of tokens.

    Yields:
        A list to which the number of tokens is added.
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

    handle = model.register_forward_hook(put, prepend=True)  # before the hooks that reshard parameters
    try:
        with head_replaced(head.linear, forward):
            yield tokens
    finally:
        handle.remove()


@torch.no_grad()
def find_output_head(model: nn.Module) -> OutputHead:
    """Find how a causal LM makes its logits, with a forward pass of two tokens and known head outputs.

    Raises:
        UnknownHeadError: it is not as an `OutputHead` does, or the head is not a plain `nn.Linear` without hooks.
        UserError: the output of the model has no `logits`.
    """
    head = _output_embeddings(model)
    if not _is_plain(head):
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


def _is_plain(head: Any) -> bool:
    """Whether a head is an `nn.Linear`, or one that FSDP2 has sharded, and not of a class that may compute else."""
    kind = type(head)
    return kind is nn.Linear or (isinstance(head, FSDPModule) and kind.__bases__ == (FSDPModule, nn.Linear))


def _has_hooks(head: nn.Linear) -> bool:
    """Whether anything but its own forward changes or sees its output; hooks of FSDP, which gather it, do not count."""
    hooks = (*head._forward_hooks.values(), *head._forward_pre_hooks.values())
    return "forward" in vars(head) or any(not _is_of_fsdp(hook) for hook in hooks)


def _is_of_fsdp(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def _probe(model: nn.Module, head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The logits of two tokens in eval mode, so that dropout draws no random numbers."""
    ids = torch.zeros((1, 2), dtype=torch.long, device=head.weight.device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with head_replaced(head, forward):
            output = model(input_ids=ids, **without_cache(model))
    except Exception as error:  # whatever a model's code raises if it needs other inputs or logits
        raise UnknownHeadError(one_line(error)) from error
    finally:
        reshard(model)  # what FSDP2 has gathered would be used again, even if other weights are loaded meanwhile
        for module in training:
            module.training = True
    if not hasattr(output, "logits"):
        raise UserError(
            f"{type(model).__name__} returns a {type(output).__name__}, which has no `logits`. Let its forward return "
            "a CausalLMOutput of transformers."
        )
    logits: Tensor | None = output.logits
    return logits


def _fit(head: nn.Linear, scale: float, largest: float) -> OutputHead:
    """The head whose logits have the slope `scale` at zero and the value `largest` at `_PROBE_LIMIT`."""
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
