"""Distillation on the output distribution: cross-entropy, forward or reverse KL, soft CE (paper Sec. 3.3)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.blocks_in_place import block_loss_
from ast_sparse.distillation.gpu_rows import counts_in_place, write_rows
from ast_sparse.distillation.terms import IGNORE_INDEX, Terms, gradient_scale

_CHUNK_TOKENS = 256  # rows of float32 temporaries alive at once
_BLOCK_ELEMENTS = 1 << 19  # logits that `loss_rows_` takes at once on a CPU, so that they stay in its cache


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, config: DistillationConfig | None,
    *, by_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`w_ce · CE + w_kl · D`, summed over the tokens whose label is not −100: the part of (4) that uses logits.

    D by `config.kind`: for kl and squarehead T² · KL(teacher‖student), (4) and (13); for reverse_kl
    T² · KL(student‖teacher), (15); for tinybert the soft cross-entropy −Σ softmax(z_T/T) · log softmax(z_S/T) without
    T², (9)-(10); for mobilebert 0. The part of a kind that uses hidden states and attention maps is `feature_loss`. If
    one model has more columns than the other (padding of the vocabulary), D compares the distributions over the columns
    that both have.

    The gradient is computed in the forward pass, a chunk of tokens at a time, so that the only tensors of the size of
    the logits are the logits and their gradient. `chunked_distillation_loss` needs neither of them.

    Args:
        student_logits: `[..., vocab]`, any float dtype; computed in float32 or wider.
        teacher_logits: `[..., vocab]`, gets no gradient; None if D has no weight or uses no logits.
        labels: `[...]` int64, already shifted: the label of a position is the next token.
        config: weights and temperature; None means plain cross-entropy.
        by_position: `[positions]` of zeros, to be filled with the loss of each position, without a gradient; or None.

    Returns:
        The summed loss (scalar, float32 or wider) and the number of tokens in it (scalar int64).

    Raises:
        ValueError: shapes differ, or D has a weight and there is no teacher.
    """
    terms = Terms.of(config)
    if student_logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(student_logits.shape)}.")
    if terms.kl_weight > 0 and teacher_logits is None:
        raise ValueError(f"kl_weight={terms.kl_weight} needs teacher logits.")
    if teacher_logits is not None and teacher_logits.shape[:-1] != labels.shape:
        raise ValueError(f"teacher logits {tuple(teacher_logits.shape)}, student {tuple(student_logits.shape)}.")
    loss = _DistillationLoss.apply(
        student_logits.flatten(0, -2),
        None if teacher_logits is None or terms.kl_weight == 0 else teacher_logits.detach().flatten(0, -2),
        labels.flatten(),
        terms,
        by_position,
    )
    return loss, (labels != IGNORE_INDEX).sum()


class _DistillationLoss(torch.autograd.Function):
    """The loss summed over tokens; the gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, terms: Terms, by_position: Tensor | None
    ) -> Tensor:
        work_dtype = torch.promote_types(student.dtype, torch.float32)
        scale = ctx.scale = gradient_scale(terms, student.dtype)
        if counts_in_place(student.device):
            grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
            losses = torch.empty(len(student), dtype=work_dtype, device=student.device)
            write_rows(student, teacher, labels, losses, grad, terms, scale=scale)
            if by_position is not None:
                by_position.copy_(losses)
            ctx.save_for_backward(grad)
            return losses.sum()
        grad = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=work_dtype, device=student.device)
        for rows in (labels != IGNORE_INDEX).nonzero().squeeze(-1).split(_CHUNK_TOKENS):
            logits = student[rows]
            reference = None if teacher is None else teacher[rows]
            losses = loss_rows_(logits, reference, labels[rows], terms, with_gradient=grad is not None, scale=scale)
            total += losses.sum()
            if by_position is not None:
                by_position[rows] = losses.to(by_position.dtype)
            if grad is not None:
                grad[rows] = logits
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * (grads[0] / ctx.scale).to(grad.dtype), None, None, None, None


def loss_rows_(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, terms: Terms, *, softcap: float | None = None,
    with_gradient: bool = True, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """The loss of each row `[rows]`; all rows count. `logits` is overwritten, with the gradient if `with_gradient`.

    On a CPU the rows are taken in blocks that stay in the cache, on a GPU as in `write_rows`.

    Args:
        logits: `[rows, vocab]`, any float dtype; computed in float32 or wider. With `softcap` c, the input of
            `c · tanh(· / c)` instead, and the gradient is with respect to that input.
        teacher: `[rows, vocab]`, any float dtype, not changed; None if D has no weight.
        labels: `[rows]` int64, none of them −100.
        scale: factor of the gradient (`gradient_scale`); 1.0 unless `logits` are in a 16-bit dtype.
    """
    work_dtype = torch.promote_types(logits.dtype, torch.float32)
    size = max(1, _BLOCK_ELEMENTS // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
    losses = torch.empty(len(logits), dtype=work_dtype, device=logits.device)
    if counts_in_place(logits.device):
        grads = logits if with_gradient else None
        write_rows(logits, teacher, labels, losses, grads, terms, softcap=softcap, scale=scale)
        return losses
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        block = logits[rows].to(work_dtype)
        reference = None if teacher is None else teacher[rows].to(work_dtype)
        losses[rows] = block_loss_(block, reference, labels[rows], terms, softcap=softcap, with_gradient=with_gradient)
        if with_gradient and block.dtype != logits.dtype:
            logits[rows] = block if scale == 1 else block.mul_(scale)
    return losses
