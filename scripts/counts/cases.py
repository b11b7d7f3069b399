"""What one layer and the loss move, counted on the CPU with toy widths, but as on a GPU.

That is: no block of the loss for the cache of a CPU, `torch.where` for masks, PyTorch's own products, and Triton's
kernels in its interpreter.
"""

import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from scripts.counts.interpreter import counted_kernels
from scripts.counts.operations import Traffic, is_arithmetic

WIDTH = 256  # of the layers whose bytes a weight are counted; one token, so that activations hardly count
ROWS, HIDDEN, VOCAB = 8, 8, 3000  # of the loss whose bytes a logit are counted
ALPHA = 0.67
autocast = partial(torch.autocast, "cpu", torch.bfloat16)


@contextmanager
def counting() -> Iterator[Traffic]:
    """A counter, not entered yet, which also sees Triton's kernels."""
    traffic = Traffic()
    with counted_kernels(traffic):
        yield traffic


def as_on_gpu() -> None:
    """Let the code of `ast_sparse` run here as on a GPU."""
    from ast_sparse.distillation import logits
    from ast_sparse.kernels import products

    logits._BLOCK_ELEMENTS = 1 << 60
    for name, function in {"masked": _where, "product_as": _product_as, "product_into": _product_into}.items():
        own = getattr(products, name, None)
        for module in list(sys.modules.values()):
            is_ours = getattr(module, "__name__", "").startswith("ast_sparse.")
            if own is not None and is_ours and getattr(module, name, None) is own:
                setattr(module, name, function)


def _where(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0)


def _product_as(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """On a GPU one product, whatever the dtypes are."""
    if torch.compiler.is_compiling():  # `decoder.py` counts what is in graphs
        return torch.mm(left, right).to(dtype)
    with _disable_current_modes():
        left, right = left.to(dtype), right.to(dtype)
    return torch.mm(left, right)


def _product_into(target: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """On a GPU one product, whatever the dtypes are."""
    with _disable_current_modes():
        left, right = left.to(target.dtype), right.to(target.dtype)
    if add:
        target.addmm_(left, right)
    else:
        torch.mm(left, right, out=target)


def chunks_of(tokens: int, vocab: int) -> int:
    """The number of chunks in which the code takes the loss of a real shape."""
    module, name = _chunk_size()
    return math.ceil(tokens / getattr(module, name)(tokens, vocab))


@contextmanager
def in_chunks(number: int) -> Iterator[None]:
    """Inside, the loss of few rows is taken in so many chunks."""
    module, name = _chunk_size()
    with patch.object(module, name, lambda tokens, *_: math.ceil(tokens / number)):
        yield


def _chunk_size() -> tuple[Any, str]:
    """Where the function is that gives the tokens of a chunk on a GPU."""
    from ast_sparse.distillation import chunked

    try:
        return importlib.import_module("ast_sparse.distillation.sliced"), "slice_size"
    except ModuleNotFoundError:  # earlier code
        return chunked, "_chunk_size"


# ---- masked products -------------------------------------------------------------------------------------------------


def layer(is_sparse: bool, micro_batches: int, checkpointing: bool) -> tuple[float, float]:
    """Bytes a weight, and kernels, of a micro-batch: forward and backward with bf16 autocast, into float32 gradients.

    The step before has been made, and the optimizer has changed the weight since.
    """
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    if is_sparse:
        _make_sparse(linear)
    x = torch.randn(1, WIDTH, requires_grad=True)

    def micro_batch() -> None:
        with autocast():
            y = checkpoint(linear, x, use_reentrant=False) if checkpointing else linear(x)
        y.backward(torch.ones_like(y))

    with counting() as traffic:
        micro_batch()
        with torch.no_grad():
            linear.weight.mul_(1.5)
        linear.weight.grad = None
        with traffic:
            for _ in range(micro_batches):
                micro_batch()
    total = traffic.total()
    return total.bytes / linear.weight.numel() / micro_batches, total.kernels / micro_batches


def _make_sparse(linear: nn.Linear) -> None:
    from ast_sparse.sparsity import model
    from ast_sparse.sparsity.layers import make_sparse
    from ast_sparse.sparsity.masks import Pattern, nm_mask

    make_sparse(linear, nm_mask(linear.weight.detach().abs()), Pattern(2, 4))
    if hasattr(model, "use_masked_weights"):
        model.use_masked_weights(linear, "kept")


def rows(is_masked: bool) -> float:
    """Bytes a weight of what FSDP2 sends in bf16, before it is sent."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from ast_sparse.sparsity.masked_piece import MaskedPiece
    from ast_sparse.sparsity.masks import nm_mask

    weight = torch.randn(WIDTH, WIDTH)
    piece: Any = weight.as_subclass(MaskedPiece)
    piece.mask = nm_mask(weight.abs())
    mesh: Any = type("OneProcess", (), {"size": lambda self: 1})()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for _ in range(2):  # kernels are tried once
        with counting() as traffic, traffic:
            if is_masked:
                piece.fsdp_pre_all_gather(mesh, weight.shape, weight.stride(), nn.Module(), policy)
            else:
                weight.to(torch.bfloat16)
    return traffic.total().bytes / weight.numel()


# ---- the loss --------------------------------------------------------------------------------------------------------


def loss(kind: str, tokens: int, chunks: int) -> Traffic:
    """The traffic of loss and gradients from hidden states, forward and backward, with bf16 autocast."""
    from ast_sparse.config import DistillationConfig
    from ast_sparse.distillation.chunked import chunked_distillation_loss

    torch.manual_seed(0)
    student, teacher = nn.Linear(HIDDEN, VOCAB, bias=False), nn.Linear(HIDDEN, VOCAB, bias=False)
    teacher.requires_grad_(False).bfloat16()
    hidden, reference = torch.randn(tokens, HIDDEN, requires_grad=True), torch.randn(tokens, HIDDEN)
    labels = torch.randint(0, VOCAB, (tokens,))
    with in_chunks(chunks), counting() as traffic, traffic:
        with autocast():
            if kind == "plain":
                result = plain_loss(student(hidden), teacher(reference), labels)
            else:
                result, _ = chunked_distillation_loss(
                    hidden, student, reference, teacher, labels, DistillationConfig(alpha=ALPHA)
                )
        result.backward()
    return traffic


def plain_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL and cross-entropy of whole logits, as `F.kl_div` and transformers compute them: in float32."""
    student, teacher = student.float(), teacher.float()
    ce = F.cross_entropy(student, labels, reduction="sum")
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    return (1 - ALPHA) * ce + ALPHA * kl


def is_head_product(name: str) -> bool:
    """Whether an operation of the loss is a product with a head; `bmm` is a dot product of rows."""
    return is_arithmetic(name) and name != "bmm"


def loss_counts(kind: str) -> dict[str, float]:
    """Counts without the products with heads, by differences: more rows, more chunks."""
    loss(kind, 2, 1)  # kernels are tried once
    traffics = [loss(kind, *about) for about in ((ROWS, 1), (2 * ROWS, 1), (ROWS, 2))]
    one, more_rows, more_chunks = (each.total(lambda name: not is_head_product(name)) for each in traffics)
    return {
        "launches of Triton": traffics[0].triton,
        "bytes a logit": (more_rows.bytes - one.bytes) / (ROWS * VOCAB),
        "bytes a weight of the head and chunk": (more_chunks.bytes - one.bytes) / (HIDDEN * VOCAB),
        "kernels a chunk": more_chunks.kernels - one.kernels,
    }


def compiled_loss() -> dict[str, float]:
    """Counts of the loss of a chunk where the code compiles it, at most; empty if it does not.

    The teacher has as many columns as the student, fewer, or more.
    """
    from ast_sparse.config import DistillationConfig

    try:
        from ast_sparse.distillation.gpu_rows import rows_function
        from ast_sparse.distillation.terms import Terms
    except ModuleNotFoundError:  # earlier code
        return {}
    from scripts.counts.inductor import compiled_total

    student = torch.empty(512, 32000, dtype=torch.bfloat16)
    labels, losses = torch.zeros(512, dtype=torch.int64), torch.empty(512)
    terms = Terms.of(DistillationConfig(alpha=ALPHA))
    teachers = (torch.empty(512, columns, dtype=torch.bfloat16) for columns in (32000, 31936, 32064))
    totals = [compiled_total(rows_function(terms), student, each, labels, losses, student) for each in teachers]
    bytes_, kernels = max(each.bytes for each in totals), max(each.kernels for each in totals)
    return {"bytes a logit": bytes_ / student.numel(), "kernels a chunk": kernels}
