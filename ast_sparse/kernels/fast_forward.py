"""Runs parts of transformers models with faster PyTorch operations during a step or an evaluation.

GPT-2's GELU keeps six tensors of the width of the feed-forward layer for the backward pass; the fused one keeps only
its input. Outputs of norms, activation functions and gated MLPs are recomputed (`kernels/recompute.py`). Dense products
are those of `kernels/products.py`. All are the same formulas, equal within rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import (
    FastGELUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    QuickGELUActivation,
    SiLUActivation,
)
from transformers.pytorch_utils import Conv1D

from ast_sparse.distributed.pieces import CHECKPOINTED
from ast_sparse.kernels.cpu import onednn
from ast_sparse.kernels.cpu.heap import freed_memory_given_back
from ast_sparse.kernels.gated_mlp import GatedMLP, find_gated_mlp
from ast_sparse.kernels.products import linear
from ast_sparse.kernels.recompute import Recomputation

_gelu_tanh = partial(F.gelu, approximate="tanh")
_FUSED = (NewGELUActivation, FastGELUActivation)  # tanh GELUs made of single operations
# Activation functions whose gradient needs the input; a ReLU's needs the output, so recomputing it saves nothing
_SMOOTH = (GELUActivation, GELUTanh, QuickGELUActivation, SiLUActivation, nn.GELU, nn.SiLU)


_Forward = Callable[..., Tensor]


def is_used(setting: str, device: torch.device, needs_memory: bool = False) -> bool:
    """Whether training steps on a device use `fast_forward`.

    On a GPU each of its operations is launched from Python, and small models wait for that; what it saves is memory.

    Args:
        setting: `sparsity.fast_forward`: auto, on or off.
        needs_memory: the run is planned not to fit on the device without it.
    """
    return setting == "on" or (setting == "auto" and (device.type == "cpu" or needs_memory))


@contextmanager
def fast_step(
    student: nn.Module,
    teacher: nn.Module | None,
    blocks: Sequence[nn.Module],
    device: torch.device,
    is_fast: bool = True,
) -> Iterator[None]:
    """Inside, a training step computes the same, faster and in less memory: `fast_forward` of both models, and on some
    CPUs freed memory is returned to the system between the student's blocks.

    Args:
        blocks: the student's decoder blocks in order.
        device: where the step runs.
        is_fast: False leaves both models as they are.
    """
    with fast_forward(*((student, teacher) if is_fast else ())), freed_memory_given_back(blocks, device):
        yield


@contextmanager
def fast_forward(*models: nn.Module | None) -> Iterator[None]:
    """Inside, the models compute the same by faster operations, which keep less; outside nothing changes.

    The backward pass of a step must be inside too, because activation checkpointing runs the forward pass again there.
    Nothing is recomputed in a model with activation checkpointing, its own or FSDP's, which recomputes whole blocks,
    nor in a frozen one, nor without gradients, where nothing is kept for a backward pass: there only single operations
    are faster, fused GELUs and the products of `kernels/products.py`. Output heads are not changed, because the loss
    calls them on hidden states.
    """
    with ExitStack() as stack:
        recompute = Recomputation()
        given = [model for model in models if model is not None]
        kept = given if torch.is_grad_enabled() else []
        recomputed = [model for model in kept if not _is_frozen(model) and not _recomputes_blocks(model)]
        if recomputed:
            stack.enter_context(recompute)
        for model in given:
            again = recompute if model in recomputed else None
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore
            for module in list(model.modules()):
                if module is not head and "forward" not in vars(module):
                    faster = _faster(module, again)
                    if faster is not None:
                        module.forward = faster
                        stack.callback(delattr, module, "forward")
        yield


def _is_frozen(model: nn.Module) -> bool:
    """Whether a model has parameters, and none of them is trained."""
    trained = [parameter.requires_grad for parameter in model.parameters()]
    return bool(trained) and not any(trained)


def _recomputes_blocks(model: nn.Module) -> bool:
    return any(
        getattr(module, "gradient_checkpointing", False) or hasattr(module, CHECKPOINTED) for module in model.modules()
    )


def _faster(module: Any, recompute: Recomputation | None) -> _Forward | None:
    """A faster forward for a module, or None if it keeps its own."""
    kind, own = type(module), module.forward
    if kind in (nn.Linear, Conv1D):
        return _faster_product(module)
    if kind in _FUSED:
        return _gelu_tanh if recompute is None else _recomputed(recompute, _gelu_tanh, _gelu_tanh)
    if recompute is None:
        return None
    if kind in _SMOOTH or kind is nn.LayerNorm:
        return _recomputed(recompute, own, own)
    if kind.__name__.endswith("RMSNorm"):  # of transformers; made of single operations, which keep two more tensors
        keeping_the_input = partial(checkpoint, own, use_reentrant=False, preserve_rng_state=False)
        return _recomputed(recompute, own, keeping_the_input)
    mlp = find_gated_mlp(module)
    return None if mlp is None else _gated_product_recomputed(recompute, mlp, module)


def _faster_product(module: Any) -> _Forward | None:
    """The forward of a linear layer by `products.linear`; None where that is PyTorch's."""
    if not onednn.is_faster():
        return None
    if type(module) is nn.Linear:
        return lambda input: linear(input, module.weight, module.bias)
    if type(module) is Conv1D:
        return lambda x: linear(x, module.weight, module.bias, group_dim=0)
    return None


def _recomputed(recompute: Recomputation, usual: _Forward, function: _Forward) -> _Forward:
    """The function of one tensor, its output recomputed; the usual forward for other arguments or without gradients."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not torch.is_grad_enabled():
            return usual(*args, **kwargs)
        return recompute(function, *args)

    return forward


def _gated_product_recomputed(recompute: Recomputation, mlp: GatedMLP, module: Any) -> _Forward:
    """The forward of a gated MLP, the input of its last projection recomputed; its own forward for other arguments."""
    own = module.forward

    def product(*projected: Tensor) -> Tensor:
        return mlp.product(getattr(module, mlp.activation), *projected)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return own(*args, **kwargs)
        projected = [getattr(module, name)(*args) for name in mlp.projections]
        return getattr(module, mlp.down)(recompute(product, *projected))

    return forward
