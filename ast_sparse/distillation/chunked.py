"""The loss (4) from hidden states: logits of both models exist only for a chunk of tokens at a time.

The gradients with respect to the student's hidden states and its head are computed in the forward pass, so that only
four products with a head are needed: two for the logits and two for the gradients.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.gpu_rows import counts_in_place
from ast_sparse.distillation.head import HeadProducts, OutputHead
from ast_sparse.distillation.logits import loss_rows_
from ast_sparse.distillation.sliced import loss_of_slices
from ast_sparse.distillation.terms import IGNORE_INDEX, Terms, gradient_scale
from ast_sparse.kernels.products import add_product, product, product_in_float32

_CHUNK_ELEMENTS = 1 << 24  # logits of one model that exist at the same time
_MIN_CHUNK, _MAX_CHUNK = 64, 1024  # tokens; a smaller chunk reads the heads too often


def chunked_distillation_loss(
    student_hidden: Tensor,
    student_head: nn.Linear | OutputHead,
    teacher_hidden: Tensor | None,
    teacher_head: nn.Linear | OutputHead | None,
    labels: Tensor,
    config: DistillationConfig | None,
    *,
    by_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`w_ce · CE + w_kl · D` of (4), summed over tokens, from hidden states; no `[tokens, vocab]` tensor is made.

    It equals `distillation_loss` of the logits that the heads compute from the hidden states: D is chosen by
    `config.kind`. If one model has more columns than the other (padding of the vocabulary), D compares the
    distributions over the columns that both have. Products run in the dtype of autocast, or without autocast in the
    dtype of each head; the loss is in float32 or wider. The gradient is computed in the forward pass, so `backward` can
    be called once. The head's weight gets one only if it requires it, the teacher none.

    Positions whose label is −100 cost nothing on a CPU. On a GPU they cost the products of other positions, but not the
    loss: leaving them out would need their number, and the CPU would have to wait for it.

    Args:
        student_hidden: `[..., hidden]`, any float dtype: the input of the student's head.
        student_head: `nn.Linear` with weight `[vocab, hidden]`, tied or not; or an `OutputHead` of
            `ast_sparse.distillation.head`, for models that scale or soft-cap their logits.
        teacher_hidden: `[..., hidden of the teacher]`, any float dtype; None if D has no weight or uses no logits.
        teacher_head: the same for the teacher.
        labels: `[...]` int64, already shifted: the label of a position is the next token.
        config: weights and temperature; None means plain cross-entropy.
        by_position: `[positions]` of zeros, to be filled with the loss of each position, without a gradient; or None.

    Returns:
        The summed loss (scalar, float32 or wider) and the number of tokens in it (scalar int64).

    Raises:
        ValueError: shapes differ, or D has a weight and there is no teacher.
    """
    terms = Terms.of(config)
    ours = student_head if isinstance(student_head, OutputHead) else OutputHead(student_head)
    theirs = teacher_head if isinstance(teacher_head, OutputHead | None) else OutputHead(teacher_head)
    if student_hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit hidden states {tuple(student_hidden.shape)}.")
    if terms.kl_weight > 0 and (teacher_hidden is None or theirs is None):
        raise ValueError(f"kl_weight={terms.kl_weight} needs hidden states and head of the teacher.")
    if teacher_hidden is not None and teacher_hidden.shape[:-1] != labels.shape:
        raise ValueError(f"teacher {tuple(teacher_hidden.shape)}, student {tuple(student_hidden.shape)}.")
    loss = _ChunkedLoss.apply(
        student_hidden.flatten(0, -2),
        ours.linear.weight,
        ours.linear.bias,
        teacher_hidden.detach().flatten(0, -2) if terms.kl_weight > 0 and teacher_hidden is not None else None,
        labels.flatten(),
        ours,
        theirs,
        terms,
        by_position,
    )
    return loss, (labels != IGNORE_INDEX).sum()


class _ChunkedLoss(torch.autograd.Function):
    """The loss summed over tokens; the gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        head: OutputHead,
        teacher_head: OutputHead | None,
        terms: Terms,
        by_position: Tensor | None,
    ) -> Tensor:
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.dtypes = [None if each is None else each.dtype for each in (hidden, weight, bias)]
        if counts_in_place(hidden.device):
            with torch.autocast(device, enabled=False):
                losses, slices = loss_of_slices(
                    hidden, teacher_hidden, labels, head, teacher_head, terms, ctx.needs_input_grad[:3], autocast
                )
            if by_position is not None:
                by_position.copy_(losses)
            ctx.factors = slices.factors
            ctx.save_for_backward(slices.by_hidden, slices.by_weight, slices.by_bias)
            return losses.sum()
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(-1)
        size = _chunk_size(len(rows), len(weight))
        with torch.autocast(device, enabled=False):
            student = HeadProducts(head, size, autocast)
            teacher = None if teacher_hidden is None or teacher_head is None else HeadProducts(teacher_head, size)
            grads = _Gradients(student, hidden, weight, bias, ctx.needs_input_grad, terms)
            total = torch.zeros((), dtype=grads.dtype, device=hidden.device)
            for part in rows.split(size):
                inputs = student.inputs(hidden[part])
                logits = student.products(inputs)
                reference = None
                if teacher is not None and teacher_hidden is not None:
                    reference = teacher.logits(teacher_hidden[part])
                losses = loss_rows_(
                    logits, reference, labels[part], terms, softcap=head.softcap, with_gradient=grads.are_needed,
                    scale=grads.scale,
                )  # fmt: skip
                total += losses.sum()
                if by_position is not None:
                    by_position[part] = losses.to(by_position.dtype)
                grads.add(part, logits, inputs)
                del logits, reference  # free them before the next chunk
        ctx.factors = (1.0, 1.0, 1.0)
        ctx.save_for_backward(grads.by_hidden, grads.by_weight, grads.by_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because the head's gradient is as large as the head. Autograd refuses a second backward pass.
        scaled = (
            None if each is None else each.mul_(grads[0] if factor == 1 else grads[0] * factor)
            for each, factor in zip(ctx.saved_tensors, ctx.factors, strict=True)
        )
        cast = (None if each is None else each.to(dtype) for each, dtype in zip(scaled, ctx.dtypes, strict=True))
        return *cast, None, None, None, None, None, None


def _chunk_size(tokens: int, vocab: int) -> int:
    """Tokens in a chunk, so that all chunks have about the same size."""
    largest = min(max(_CHUNK_ELEMENTS // vocab, _MIN_CHUNK), _MAX_CHUNK)
    return max(1, math.ceil(tokens / max(1, math.ceil(tokens / largest))))


class _Gradients:
    """Gradients of the summed loss, in float32 or wider; None if they are not needed.

    Attributes:
        scale: factor of the gradients that `add` is given.
    """

    def __init__(
        self,
        product: HeadProducts,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: tuple[bool, ...],
        terms: Terms,
    ) -> None:
        self.product, self.scale = product, gradient_scale(terms, product.weight.dtype)
        self.are_needed = any(needed)
        self.dtype = torch.promote_types(product.weight.dtype, torch.float32)
        self.by_hidden, self.by_weight, self.by_bias = (
            torch.zeros_like(each, dtype=self.dtype) if is_needed and each is not None else None
            for each, is_needed in zip((hidden, weight, bias), needed, strict=False)
        )

    def add(self, rows: Tensor, grad: Tensor, inputs: Tensor) -> None:
        """Add the gradients of a chunk.

        Args:
            rows: its positions, int64.
            grad: `[rows, vocab]`, `scale` times that with respect to the products of the head.
            inputs: `[rows, hidden]`, the inputs of the products.
        """
        scale, is_scaled = self.product.head.scale / self.scale, self.scale != 1
        if self.by_hidden is not None:
            by_hidden = product_in_float32 if is_scaled else product
            self.by_hidden[rows] = by_hidden(grad, self.product.weight).to(self.dtype).mul_(scale)
        if self.by_weight is not None and is_scaled:
            self.by_weight.add_(product_in_float32(grad.t(), inputs), alpha=1 / self.scale)
        elif self.by_weight is not None:
            add_product(self.by_weight, grad.t(), inputs)
        if self.by_bias is not None:
            self.by_bias.add_(grad.sum(0, dtype=self.dtype), alpha=scale)
