"""Loss and gradient of a few rows of logits by PyTorch's operations in place, which read and write less memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.distillation.terms import Terms


def block_loss_(
    block: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    terms: Terms,
    *,
    softcap: float | None = None,
    with_gradient: bool = True,
) -> Tensor:
    """The loss of each row `[rows]`; `block` is overwritten, with the gradient if `with_gradient`.

    Args:
        block: `[rows, vocab]`, float32 or wider. With `softcap` c, the input of `c · tanh(· / c)` instead, and the
            gradient is with respect to that input.
        teacher: `[rows, vocab of the teacher]` of the same dtype, not changed; None if D has no weight.
        labels: `[rows]` int64, each of them a column.
    """
    slope = None
    if softcap is not None:
        block.div_(softcap).tanh_()
        slope = 1 - block.square() if with_gradient else None
        block.mul_(softcap)
    losses = _block_loss_(block, teacher, labels, terms, with_gradient)
    if slope is not None:
        block.mul_(slope)
    return losses


def _block_loss_(logits: Tensor, teacher: Tensor | None, labels: Tensor, terms: Terms, with_gradient: bool) -> Tensor:
    """As `block_loss_`, without a soft cap. ∂CE/∂z = p_s − onehot."""
    index = labels.unsqueeze(-1)
    log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
    loss = log_p.gather(-1, index).squeeze(-1) * -terms.ce_weight
    grad, is_p = None, False  # whether the soft loss has turned log p_s into p_s
    if teacher is not None:
        width = min(logits.shape[-1], teacher.shape[-1])
        reference = teacher[:, :width]
        log_t = F.log_softmax(reference if terms.temperature == 1 else reference / terms.temperature, dim=-1)
        is_p = terms.temperature == 1 and width == logits.shape[-1]
        log_s = log_p if is_p else F.log_softmax(log_p[:, :width] / terms.temperature, dim=-1)
        soft_loss, grad = _soft_loss_(log_s, log_t, terms)
        loss = loss + soft_loss
    if with_gradient:
        p = log_p if is_p else log_p.exp_()
        p.mul_(terms.ce_weight).scatter_add_(-1, index, p.new_full(index.shape, -terms.ce_weight))
        if grad is not None:
            p[:, : grad.shape[-1]].add_(grad)
    return loss


def _soft_loss_(log_s: Tensor, log_t: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """`kl_weight · D` of each row, and its gradient with respect to the student's logits; `log_s` becomes p_s.

    Forward: ∂/∂z = weight · T · (p_s − p_t). Reverse: weight · T · p_s ⊙ (log p_s − log p_t − KL). Soft CE, which is
    the forward KL plus the teacher's entropy, without T²: weight · (p_s − p_t) / T.
    """
    weight, temperature = terms.kl_weight, terms.temperature
    scale = weight if terms.kind == "tinybert" else weight * temperature**2
    if terms.kind == "reverse_kl":
        difference = log_t.neg_().add_(log_s)
        p_s = log_s.exp_()
        kl = torch.linalg.vecdot(p_s, difference)
        return scale * kl, difference.sub_(kl.unsqueeze(-1)).mul_(p_s).mul_(scale / temperature)
    p_t = log_t.exp()
    compared = log_s.neg() if terms.kind == "tinybert" else log_t.sub_(log_s)
    loss = torch.linalg.vecdot(p_t, compared)
    return scale * loss, torch.sub(log_s.exp_(), p_t, out=p_t).mul_(scale / temperature)
