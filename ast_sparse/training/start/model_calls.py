"""How student and teacher are called in a micro-batch: without a wait for the device, and compiled if that is asked."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments, masking_utils

from ast_sparse.kernels.waits import waits
from ast_sparse.sparsity.layers import SparseLayer
from ast_sparse.sparsity.select import decoder_blocks
from ast_sparse.training.fsdp import sharding_plugin

_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of `torch.compile`


def compiles_decoders(args: TrainingArguments) -> bool:
    """Whether a run compiles the decoders of its models by `CompiledDecoders`; a sharded run leaves it to accelerate,
    which compiles the whole student."""
    return bool(args.torch_compile) and sharding_plugin(args) is None


def graphs_read_copies(backend: Any, mode: str | None) -> bool:
    """Whether compiled decoders read the masked weights that layers keep. CUDA graphs make them themselves, because
    they would be recorded again whenever a copy is somewhere else.

    Args:
        backend, mode: as `torch.compile` takes them; without a mode accelerate's environment variable counts.
    """
    return backend != "cudagraphs" and TorchDynamoPlugin(backend="eager", mode=mode).mode not in _CUDA_GRAPHS


class CompiledDecoders:
    """A context in which the decoders of models run compiled, and their heads and the loss as usual.

    So the loss is computed from hidden states, and the compiled graphs have no logits. A decoder is one graph, under
    DDP one for each of its buckets; a model without a decoder of its own has its blocks compiled, one after the other.
    Outside the context the models are as they were: what is generated or measured with them compiles nothing. It may be
    entered again inside itself.

    A graph cannot ask whether a kept masked weight is up to date, so that is asked before each call of a decoder
    (`SparseLayer.graph_copy`).

    Args:
        models: causal LMs, not their wrappers.
        backend, mode: as `torch.compile` takes them; other settings are those of accelerate's environment variables.
    """

    def __init__(self, models: Iterable[PreTrainedModel | None], backend: Any, mode: str | None) -> None:
        options = TorchDynamoPlugin(backend="eager", mode=mode).to_kwargs()
        options = {**options, "backend": backend}
        parts = [part for model in models if model is not None for part in _decoder(model)]
        self._compiled = [(part, torch.compile(part.forward, **options)) for part in parts]
        self._reads_copies = graphs_read_copies(backend, mode)
        self._before: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> None:
        for part, compiled in self._compiled:
            self._before.append((part, vars(part).get("forward")))
            part.forward = _with_copies(part, compiled) if self._reads_copies else compiled

    def __exit__(self, *args: object) -> None:
        for _ in self._compiled:
            part, own = self._before.pop()
            if own is None:
                del part.forward
            else:
                part.forward = own
        if not self._before:
            for part, _ in self._compiled:
                for layer in _sparse_layers(part):
                    layer.drop_graph_copy()


def _with_copies(part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled forward pass that reads the masked weights which sparse layers keep."""

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        for layer in _sparse_layers(part):
            layer.set_graph_copy()
        return forward(*args, **kwargs)

    return call


def _sparse_layers(part: nn.Module) -> list[SparseLayer]:
    return [module for module in part.modules() if isinstance(module, SparseLayer)]


def _decoder(model: PreTrainedModel) -> list[nn.Module]:
    """What is compiled of a model: all but its head."""
    decoder = model.base_model
    return [decoder] if decoder is not model else list(decoder_blocks(model).values())


@contextmanager
def compilation_hidden(args: TrainingArguments) -> Iterator[None]:
    """Inside, accelerate is not told to compile the whole model, if the run compiles decoders."""
    backend = args.torch_compile_backend  # which alone decides, whatever `torch_compile` says
    if compiles_decoders(args):
        args.torch_compile_backend = "no"
    try:
        yield
    finally:
        args.torch_compile_backend = backend


@contextmanager
def borders_known(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, transformers does not look at the positions of a batch to see whether a row has several documents: on a
    GPU it waits for the device to know, once in each forward pass.

    Without `position_ids` a row is one document. With them, on a GPU, the attention mask is made from them, also for a
    batch that happens to have no border. On a CPU, where nothing waits, transformers still looks at them.

    Args:
        inputs: those of the model.
    """
    positions, own = inputs.get("position_ids"), masking_utils.find_packed_sequence_indices
    if positions is None:
        masking_utils.find_packed_sequence_indices = _no_borders
    elif waits(positions.device):
        masking_utils.find_packed_sequence_indices = _borders
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


def _no_borders(position_ids: Tensor) -> None:
    return None


def _borders(position_ids: Tensor) -> Tensor:
    """The number of the document in its row, int64 `[batch, seq]`, as transformers computes it."""
    before = torch.cat([position_ids[:, :1] - 1, position_ids[:, :-1]], dim=1)
    return (position_ids - before != 1).cumsum(-1)
