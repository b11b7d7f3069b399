"""Parts of transformers models in faster operations of PyTorch, while a step or an evaluation runs.

GPT-2's GELU keeps six tensors of the width of the feed-forward layer for the backward pass; the fused one keeps its
input. What norms, activation functions and gated MLPs give is made again (`kernels/recompute.py`). Dense products go
the way `kernels/products.py` chooses. All are the same formulas, equal to rounding.
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

from ast_sparse.kernels.cpu.heap import freed_memory_given_back
from ast_sparse.kernels.gated_mlp import GatedMLP, find_gated_mlp
from ast_sparse.kernels.products import linear
from ast_sparse.kernels.recompute import Recomputation

_gelu_tanh = partial(F.gelu, approximate="tanh")
_FUSED = (NewGELUActivation, FastGELUActivation)  # GELUs by tanh in plain operations
# Activation functions whose gradient needs the input; a ReLU's needs the output, which is not worth making again
_SMOOTH = (GELUActivation, GELUTanh, QuickGELUActivation, SiLUActivation, nn.GELU, nn.SiLU)

_FSDP_CHECKPOINTED = "_checkpoint_wrapped_module"  # the attribute of FSDP's wrapper for activation checkpointing

_Forward = Callable[..., Tensor]


@contextmanager
def fast_step(
    student: nn.Module, teacher: nn.Module | None, blocks: Sequence[nn.Module], device: torch.device
) -> Iterator[None]:
    """Inside, a training step computes the same as outside, faster and in less memory: `fast_forward` of both models,
    and what the step has freed is given back between the student's blocks, where that is worth its time.

    Args:
        blocks: the student's decoder blocks in their order.
        device: where the step runs.
    """
    with fast_forward(student, teacher), freed_memory_given_back(blocks, device):
        yield


@contextmanager
def fast_forward(*models: nn.Module | None) -> Iterator[None]:
    """Inside, the models compute the same by faster operations, which keep less; outside all is as it was.

    A step must be inside with its backward pass: activation checkpointing runs the forward pass again there. A model
    with activation checkpointing, its own or FSDP's, makes whole blocks again, and nothing else. Output heads are left
    alone, because they are called from hidden states.
    """
    with ExitStack() as stack:
        recompute = Recomputation()
        if not all(model is None or _makes_blocks_again(model) for model in models):
            stack.enter_context(recompute)
        for model in models:
            modules = [] if model is None else list(model.modules())
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore
            again = None if model is None or _makes_blocks_again(model) else recompute
            for module in modules:
                if module is not head and "forward" not in vars(module):
                    faster = _faster(module, again)
                    if faster is not None:
                        module.forward = faster
                        stack.callback(delattr, module, "forward")
        yield


def _makes_blocks_again(model: nn.Module) -> bool:
    return any(
        getattr(module, "gradient_checkpointing", False) or hasattr(module, _FSDP_CHECKPOINTED)
        for module in model.modules()
    )


def _faster(module: Any, recompute: Recomputation | None) -> _Forward | None:
    """Another forward for a module, or None where its own stays."""
    kind, own = type(module), module.forward
    if kind is nn.Linear:
        return lambda input: linear(input, module.weight, module.bias)
    if kind is Conv1D:
        return lambda x: linear(x, module.weight, module.bias, by_input=True)
    if kind in _FUSED:
        return _gelu_tanh if recompute is None else _made_again(recompute, _gelu_tanh, _gelu_tanh)
    if recompute is None:
        return None
    if kind in _SMOOTH or kind is nn.LayerNorm:
        return _made_again(recompute, own, own)
    if kind.__name__.endswith("RMSNorm"):  # of transformers; in plain operations, which keep two tensors more
        keeping_the_input = partial(checkpoint, own, use_reentrant=False, preserve_rng_state=False)
        return _made_again(recompute, own, keeping_the_input)
    mlp = find_gated_mlp(module)
    return None if mlp is None else _gated_product_made_again(recompute, mlp, module)


def _made_again(recompute: Recomputation, usual: _Forward, function: _Forward) -> _Forward:
    """The function of one tensor, its output made again; the usual forward for other arguments or without gradients."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs or not torch.is_grad_enabled():
            return usual(*args, **kwargs)
        return recompute(function, *args)

    return forward


def _gated_product_made_again(recompute: Recomputation, mlp: GatedMLP, module: Any) -> _Forward:
    """The forward of a gated MLP, what goes into its last projection made again; its own for other arguments."""
    own = module.forward

    def product(*projected: Tensor) -> Tensor:
        return mlp.product(getattr(module, mlp.activation), *projected)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return own(*args, **kwargs)
        projected = [getattr(module, name)(*args) for name in mlp.projections]
        return getattr(module, mlp.down)(recompute(product, *projected))

    return forward
