"""Weights and moments in host memory: what `optimizer.offload` does, for a model that does not fit on one GPU.

The parameters that the model computes with stay on the device: the masked weights of sparse layers in the precision of
their products, all others as they were. Gradients are float32 there, so that accumulation and clipping are those of an
ordinary run. The weights themselves, float32 and dense, the moments and the masks are in host memory, where the
optimizer updates them with the same functions; then it writes the masked weights to the device. So a run with offload
makes the same steps as one without, to the bit where host and device compute alike.

Gradients travel while the host updates the weight before, and weights travel back at the same time. They do not leave
during the backward pass: clipping scales them after it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ast_sparse.kernels.products import masked
from ast_sparse.optim import SparseAdamW
from ast_sparse.sparsity.layers import SparseLayer

Wait = Callable[[], None]


class Copies(Protocol):
    """How tensors are copied between device and host."""

    def buffer(self, size: int) -> Tensor:
        """Host memory, uint8 `[size]`, that copies may go through."""

    def begin(self) -> None:
        """The device may still compute what is copied next; copies wait for it."""

    def fetch(self, target: Tensor, source: Tensor) -> Wait:
        """Start a copy from the device; the result waits until it is done."""

    def send(self, target: Tensor, source: Tensor) -> Wait:
        """Start a copy to the device; the result waits until it is done."""

    def end(self) -> None:
        """The device computes on only when everything sent has arrived."""


class DirectCopies:
    """Copies where the device is the host."""

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def begin(self) -> None: ...

    def fetch(self, target: Tensor, source: Tensor) -> Wait:
        target.copy_(source)
        return _nothing

    send = fetch

    def end(self) -> None: ...


class CudaCopies:
    """Copies from and to a GPU on two streams of their own, through pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> None:
        for stream in (self._down, self._up):
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def fetch(self, target: Tensor, source: Tensor) -> Wait:
        return self._copy(self._down, target, source)

    def send(self, target: Tensor, source: Tensor) -> Wait:
        return self._copy(self._up, target, source)

    def _copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> Wait:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return done.synchronize

    def end(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._up)


class Staging:
    """Two host buffers for each direction, used in turn, so that a copy is under way while the host computes.

    Args:
        largest: bytes of the largest tensor.
    """

    def __init__(self, copies: Copies, largest: int) -> None:
        self._copies = copies
        self._fetched, self._sent = ([copies.buffer(largest) for _ in range(2)] for _ in range(2))
        self._waits: list[Wait] = [_nothing, _nothing]  # until a buffer has been sent
        self._turn = 0

    def fetch(self, sources: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each tensor of the device as one of the host, which is valid until the next is asked for."""
        self._copies.begin()
        ahead = self._start(0, sources[0]) if sources else None
        for i in range(len(sources)):
            assert ahead is not None
            fetched, wait = ahead
            ahead = self._start(i + 1, sources[i + 1]) if i + 1 < len(sources) else None
            wait()
            yield fetched

    def _start(self, i: int, source: Tensor) -> tuple[Tensor, Wait]:
        target = _shaped(self._fetched[i % 2], source)
        return target, self._copies.fetch(target, source)

    def send(self, source: Tensor, target: Tensor) -> None:
        """Start to copy a tensor of the host, which may change afterwards, into one of the device, in its dtype."""
        self._waits[self._turn]()
        buffer = _shaped(self._sent[self._turn], target)
        buffer.copy_(source)
        self._waits[self._turn] = self._copies.send(target, buffer)
        self._turn = 1 - self._turn

    def end(self) -> None:
        self._copies.end()


class OffloadedAdamW(SparseAdamW):
    """SparseAdamW whose weights and moments are in host memory between `begin_offload` and `end_offload`.

    Args:
        half: dtype of the masked weights on the device, that of autocast; None for their own.
        others: as in SparseAdamW; the moments are float32.

    Attributes:
        copies: makes the copies between a device and the host.
    """

    def __init__(self, *args: Any, half: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.copies: Callable[[torch.device], Copies] = copies_for
        self._half = half
        self._weights: dict[Tensor, Tensor] = {}  # in host memory, by parameter
        self._on_device: dict[Tensor, Tensor] = {}  # inside `true_weights`, what the parameters hold otherwise
        self._layers: list[SparseLayer] = []
        self._own_masks: dict[Tensor, Tensor] = {}  # of all layers, bound or not yet
        self._staging: Staging | None = None

    @torch.no_grad()
    def begin_offload(self, model: nn.Module) -> None:
        """Move weights, moments and masks to the host; a second call changes nothing."""
        if self._weights:
            return
        self._layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
        self._own_masks = {layer.weight: layer.mask for layer in self._layers}
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        # sparse weights that are not trained are masked on the device, too, but they have no state
        trained = set(parameters)
        frozen = [weight for weight in self._own_masks if weight not in trained]
        for parameter in parameters + frozen:
            weight = parameter.detach().to("cpu", copy=True)
            mask = self._own_masks.get(parameter)
            if mask is not None:
                on_device = masked(parameter.detach(), mask.detach())
                parameter.data = on_device.to(self._half or parameter.dtype)
                if parameter.requires_grad:
                    parameter.grad_dtype = weight.dtype
            self._weights[parameter] = weight
            for key, value in self.state.get(parameter, {}).items():
                self.state[parameter][key] = value.to("cpu")
        for layer in self._layers:
            layer.device_mask = layer.mask.detach().clone() if layer.fixed_mask else None
        for layer in self._layers:
            for mask in (layer.mask, layer.start_mask):
                mask.data = mask.data.to("cpu")
            layer.is_offloaded = True
        largest = max(weight.nbytes for weight in self._weights.values())
        self._staging = Staging(self.copies(parameters[0].device), largest)

    @torch.no_grad()
    def end_offload(self) -> None:
        """Put the whole weights and the masks back onto the device; the moments stay where they are."""
        for parameter, weight in self._weights.items():
            parameter.data = weight.to(parameter.device)
        device = next(iter(self._weights)).device if self._weights else None
        for layer in self._layers:
            for mask in (layer.mask, layer.start_mask):
                mask.data = mask.data.to(device)
            layer.is_offloaded, layer.device_mask = False, None
        self._weights, self._layers, self._own_masks, self._staging = {}, [], {}, None

    @contextmanager
    def true_weights(self) -> Iterator[None]:
        """Inside, the model is an ordinary one in host memory; what it changes there is written to the device."""
        if not self._weights or self._on_device:
            yield
            return
        for parameter, weight in self._weights.items():
            self._on_device[parameter], parameter.data = parameter.data, weight
        for layer in self._layers:
            layer.is_offloaded = False
        try:
            yield
        finally:
            for parameter, on_device in self._on_device.items():
                parameter.data = on_device
            self._on_device = {}
            for layer in self._layers:
                layer.is_offloaded = True
                if layer.device_mask is not None:  # the masks of IMP and GMP grow
                    layer.device_mask.copy_(layer.mask.detach())
            for parameter in self._weights:
                self._send(parameter)
            self._finish()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient, in host memory if it is offloaded."""
        if self._staging is None:
            return super().step(closure)
        due = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = self._staging.fetch([p.grad for p, _ in due])
        for (parameter, group), grad in zip(due, grads, strict=True):
            self._update([(parameter, self._weights[parameter], grad)], group)
            self._send(parameter)
        self._finish()
        return None

    def _zero_moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        return super()._zero_moments(self._weights.get(parameter, parameter))

    @torch.no_grad()
    def _send(self, parameter: Tensor) -> None:
        assert self._staging is not None
        weight, mask = self._weights[parameter], self._own_masks.get(parameter)
        self._staging.send(weight if mask is None else masked(weight, mask.detach()), parameter.detach())

    def _finish(self) -> None:
        assert self._staging is not None
        self._staging.end()


def copies_for(device: torch.device) -> Copies:
    """Copies between the host and a device."""
    return CudaCopies(device) if device.type == "cuda" else DirectCopies()


def _nothing() -> None: ...


def _shaped(buffer: Tensor, like: Tensor) -> Tensor:
    """The beginning of a buffer of bytes as a tensor of another's shape and dtype."""
    return buffer[: like.nbytes].view(like.dtype).view(like.shape)
