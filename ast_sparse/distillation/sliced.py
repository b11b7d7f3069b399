"""The loss from hidden states on a GPU: slices of all positions, ignored ones too, so nothing waits for the device.

A slice is two products with a head, one kernel for loss and gradient, and two products for the gradients, which write
where the gradients stay. Casts of hidden states come to that, and what biases need.
"""

import math

import torch
from torch import Tensor

from ast_sparse.distillation.gpu_rows import is_planned_for_gpu, write_rows
from ast_sparse.distillation.head import HeadProducts, OutputHead
from ast_sparse.distillation.terms import IGNORE_INDEX, Terms, gradient_scale
from ast_sparse.kernels.products import product_into

_ELEMENTS = 1 << 26  # logits of one model that exist at the same time
_MIN_TOKENS = 1024  # in a smaller slice, reading and writing the whole gradient of the head takes too much of the time
_EVEN = 128  # tokens that a slice has a multiple of: tiles of a product
_ALIGN = 64  # entries that the stride of logits is a multiple of: 128 bytes in 16 bits


def slice_size(tokens: int, vocab: int) -> int:
    """Tokens in a slice, so that all slices have about the same size."""
    largest = max(_ELEMENTS // vocab, _MIN_TOKENS)
    size = math.ceil(tokens / max(1, math.ceil(tokens / largest)))
    return max(1, min(tokens, math.ceil(size / _EVEN) * _EVEN))


def loss_of_slices(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    labels: Tensor,
    head: OutputHead,
    teacher_head: OutputHead | None,
    terms: Terms,
    needed: tuple[bool, ...],
    autocast: torch.dtype | None,
) -> tuple[Tensor, "SliceGradients"]:
    """The loss of each position `[tokens]`, and the gradients of their sum.

    Args:
        hidden: `[tokens, hidden]`; teacher_hidden: `[tokens, hidden of the teacher]`, or None if D has no weight.
        labels: `[tokens]` int64.
        needed: whether hidden states, weight and bias of the student's head need a gradient.
        autocast: the dtype of autocast, for the student's products; or None.
    """
    size = slice_size(len(labels), len(head.linear.weight))
    student = HeadProducts(head, size, autocast, _ALIGN)
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        teacher = HeadProducts(teacher_head, size, align=_ALIGN)
    grads = SliceGradients(student, hidden, needed, terms)
    losses = torch.empty(len(labels), dtype=grads.dtype, device=hidden.device)
    ignored = (labels == IGNORE_INDEX).unsqueeze(-1)
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        states = hidden[rows]
        if grads.by_weight is not None:  # an inf in an ignored row times its gradient, 0, would be NaN
            states = states.masked_fill(ignored[rows], 0)
        inputs = student.inputs(states)
        del states
        logits = student.products(inputs)
        reference, softcap = None, None
        if teacher is not None and teacher_hidden is not None:
            reference, softcap = teacher.products(teacher.inputs(teacher_hidden[rows])), teacher.head.softcap
        write_rows(
            logits, reference, labels[rows], losses[rows], logits if grads.are_needed else None, terms,
            softcap=head.softcap, teacher_softcap=softcap, scale=grads.scale,
        )  # fmt: skip
        grads.add(rows, logits, inputs)
    return losses, grads


class SliceGradients:
    """Gradients of the summed loss in float32 or wider, but for `factors`; None if they are not needed.

    Attributes:
        by_hidden: `[tokens, hidden]`; by_weight: `[vocab, hidden]`; by_bias: `[vocab]`.
        factors: what each has to be multiplied by.
        scale: factor of the gradients that `add` is given.
    """

    def __init__(self, student: HeadProducts, hidden: Tensor, needed: tuple[bool, ...], terms: Terms) -> None:
        self.student, self.scale = student, gradient_scale(terms, student.weight.dtype)
        self.are_needed = any(needed)
        self.dtype = torch.promote_types(student.weight.dtype, torch.float32)
        scale = student.head.scale / self.scale
        self.factors = (scale, 1 / self.scale, scale)
        shapes = (hidden.shape, student.weight.shape, None if student.bias is None else student.bias.shape)
        make = torch.empty if len(hidden) else torch.zeros  # without a slice nothing is written
        self.by_hidden, self.by_weight, self.by_bias = (
            make(shape, dtype=self.dtype, device=hidden.device) if is_needed and shape is not None else None
            for shape, is_needed in zip(shapes, needed, strict=True)
        )

    def add(self, rows: slice, grad: Tensor, inputs: Tensor) -> None:
        """Write or add the gradients of a slice.

        Args:
            rows: its positions; the first slice starts at 0.
            grad: `[rows, vocab]`, `scale` times that with respect to the products of the head.
            inputs: `[rows, hidden]`, the inputs of the products.
        """
        if is_planned_for_gpu():
            return  # products are written where they stay
        is_first = rows.start == 0
        if self.by_hidden is not None:
            product_into(self.by_hidden[rows], grad, self.student.weight)
        if self.by_weight is not None:
            product_into(self.by_weight, grad.t(), inputs, add=not is_first)
        if self.by_bias is not None:
            summed = grad.sum(0, dtype=self.dtype)
            self.by_bias = summed if is_first else self.by_bias.add_(summed)
