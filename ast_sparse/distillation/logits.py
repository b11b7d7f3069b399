"""Distillation on the output distribution: cross-entropy, KL forward or reverse, soft CE (paper Sec. 3.3)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.config import DistillationConfig

IGNORE_INDEX = -100
_CHUNK_TOKENS = 256  # rows of float32 temporaries alive at once


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, config: DistillationConfig | None
) -> tuple[Tensor, Tensor]:
    """`w_ce · CE + w_kl · D`, summed over the tokens whose label is not −100: the part of (4) that looks at logits.

    D by `config.kind`: kl and squarehead T² · KL(teacher‖student), (4) and (13); reverse_kl T² · KL(student‖teacher),
    (15); tinybert the soft cross-entropy −Σ softmax(z_T/T) · log softmax(z_S/T) without T², (9)-(10); mobilebert
    nothing. What the kind says of hidden states and attention maps is `feature_loss`.

    The gradient is computed in the forward pass, a chunk of tokens at a time, so that the only tensors of the size of
    the logits are the logits themselves and their gradient.

    Args:
        student_logits: `[..., vocab]`, any float dtype; computed in float32 or wider.
        teacher_logits: the same shape, no gradient; None where D has no weight or looks at no logits.
        labels: `[...]` int64, already shifted: the label of a position is the token that follows it.
        config: weights and temperature; None is plain cross-entropy.

    Returns:
        The summed loss (scalar, float32 or wider) and the number of tokens in it (scalar int64).

    Raises:
        ValueError: shapes differ, or D has weight and there is no teacher.
    """
    ce_weight, kl_weight = (1.0, 0.0) if config is None else config.weights
    if student_logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(student_logits.shape)}.")
    kind = "kl" if config is None else config.kind
    kl_weight = 0.0 if kind == "mobilebert" else kl_weight
    if kl_weight > 0 and teacher_logits is None:
        raise ValueError(f"kl_weight={kl_weight} needs teacher logits.")
    if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
        raise ValueError(f"teacher logits {tuple(teacher_logits.shape)}, student {tuple(student_logits.shape)}.")
    temperature = 1.0 if config is None else config.temperature
    loss = _DistillationLoss.apply(
        student_logits.flatten(0, -2),
        None if teacher_logits is None or kl_weight == 0 else teacher_logits.detach().flatten(0, -2),
        labels.flatten(),
        ce_weight,
        kl_weight,
        temperature,
        kind,
    )
    return loss, (labels != IGNORE_INDEX).sum()


class _DistillationLoss(torch.autograd.Function):
    """Sum of the loss over tokens; the gradient is ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        ce_weight: float,
        kl_weight: float,
        temperature: float,
        kind: str,
    ) -> Tensor:
        work_dtype = torch.promote_types(student.dtype, torch.float32)
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=work_dtype, device=student.device)
        for start in range(0, len(labels), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            counted = labels[rows] != IGNORE_INDEX
            logits = student[rows].to(work_dtype)
            chunk_grad = torch.zeros_like(logits) if grad is not None else None
            loss = _cross_entropy(logits, labels[rows], ce_weight, chunk_grad)
            if teacher is not None:
                loss = loss + _kl(logits, teacher[rows].to(work_dtype), kl_weight, temperature, kind, chunk_grad)
            total += torch.where(counted, loss, 0).sum()
            if grad is not None and chunk_grad is not None:
                grad[rows] = chunk_grad.masked_fill_(~counted.unsqueeze(-1), 0)
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None, None, None


def _cross_entropy(logits: Tensor, labels: Tensor, weight: float, grad: Tensor | None) -> Tensor:
    """Cross-entropy of each row at T = 1; adds `weight · (p − onehot)` to `grad`."""
    if weight == 0:
        return logits.new_zeros(len(logits))
    index = labels.clamp(min=0).unsqueeze(-1)
    log_p = F.log_softmax(logits, dim=-1)
    loss = -weight * log_p.gather(-1, index).squeeze(-1)
    if grad is not None:
        grad.add_(log_p.exp_(), alpha=weight)
        grad.scatter_add_(-1, index, grad.new_full(index.shape, -weight))
    return loss


def _kl(student: Tensor, teacher: Tensor, weight: float, temperature: float, kind: str, grad: Tensor | None) -> Tensor:
    """`weight · T² · KL` or weight · soft CE of each row; adds its gradient by the student's logits to `grad`.

    Forward: ∂/∂z = weight · T · (p_s − p_t). Reverse: weight · T · p_s ⊙ (log p_s − log p_t − KL). Soft CE, which is
    the forward KL plus the teacher's entropy, without T²: weight · (p_s − p_t) / T.
    """
    log_s = F.log_softmax(student / temperature, dim=-1)
    log_t = F.log_softmax(teacher / temperature, dim=-1)
    p_s = log_s.exp()
    if kind == "reverse_kl":
        difference = log_s - log_t
        kl = (p_s * difference).sum(-1)
        if grad is not None:
            grad.add_(p_s * (difference - kl.unsqueeze(-1)), alpha=weight * temperature)
        return weight * temperature**2 * kl
    p_t = log_t.exp()
    if kind == "tinybert":
        scale, loss = weight, -(p_t * log_s).sum(-1)
    else:
        scale, loss = weight * temperature**2, (p_t * (log_t - log_s)).sum(-1)
    if grad is not None:
        grad.add_(p_s.sub_(p_t), alpha=scale / temperature)
    return scale * loss
