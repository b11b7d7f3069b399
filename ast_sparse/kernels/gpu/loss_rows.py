"""The distillation loss of rows of logits on an NVIDIA GPU, in one Triton kernel. Not measured on a GPU yet.

The kernel reads the logits of both models twice and writes the gradient once: 10 bytes a logit where logits have 16
bits. The environment variable AST_SPARSE_GPU chooses: with `plain` nothing is taken, `auto` and `fixed` are the same
here. Nothing waits for the GPU, and results are the same in every call.
"""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.kernels.gpu.dispatch import is_interpreted, setting, tried

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK, _WARPS = 4096, 8  # columns of a step, and warps of a program, which has one row
_WIDEST = 1 << 30  # columns: their numbers have 32 bits


def takes(student: Tensor, teacher: Tensor | None, labels: Tensor) -> bool:
    """Whether `loss_rows` computes the loss of these logits.

    Raises:
        UserError: the environment variable has an unknown value.
    """
    device = student.device
    on_gpu = device.type == "cuda" or (device.type == "cpu" and is_interpreted())
    if not on_gpu or torch.compiler.is_compiling():
        return False
    logits = [student] if teacher is None else [student, teacher]
    if any(type(each) not in (Tensor, torch.nn.Parameter) or each.device != device for each in (*logits, labels)):
        return False
    if labels.dtype != torch.int64 or labels.dim() != 1 or not labels.is_contiguous():
        return False
    fits = all(
        each.dtype in _DTYPES and each.dim() == 2 and len(each) == len(labels) and 0 < each.shape[1] < _WIDEST
        and (each.stride(1) == 1 or each.shape[1] == 1) for each in logits
    )  # fmt: skip
    return fits and setting() != "plain" and fault(device) is None


def loss_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    grads: Tensor | None,
    *,
    kind: str = "kl",
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    scale: float = 1.0,
) -> None:
    """Write `w_ce · CE + w_kl · D` of each row, and its gradient, for what `takes` accepts.

    D as in `ast_sparse.distillation.logits.distillation_loss`, over the columns that both models have. Arithmetic is in
    float32.

    Args:
        student: `[rows, vocab]`, its products before the soft cap.
        teacher: `[rows, vocab of the teacher]`, likewise; None for the cross-entropy alone.
        labels: `[rows]` int64. Where −100 the loss and the gradient are 0, whatever the logits are. A label that is
            neither −100 nor a column gives NaN.
        losses: `[rows]` float32, contiguous, overwritten.
        grads: `[rows, vocab]` of a dtype that `takes` accepts, overwritten with `scale` times the gradient with respect
            to `student`; it may be `student`. None if no gradient is needed.
        kind: of D: `reverse_kl`, `tinybert` for soft cross-entropy without T², and forward KL for all others.
        softcap, teacher_softcap: c of `c · tanh(· / c)`, which makes logits of the products of each model.
    """
    from ast_sparse.kernels.gpu.triton_loss import distil_rows

    rows, width = student.shape
    if not rows:
        return
    reference, out = student if teacher is None else teacher, student if grads is None else grads
    common = min(width, reference.shape[1])
    weight = kl_weight if kind == "tinybert" else kl_weight * temperature**2
    is_one = teacher is not None and ce_weight > 0 and temperature == 1 and common == width
    block = min(_BLOCK, max(256, 1 << (width - 1).bit_length()))
    with torch.cuda.device_of(student):  # Triton launches on the current GPU
        distil_rows[(rows,)](
            student, reference, out, labels, losses, student.stride(0), reference.stride(0), out.stride(0), width,
            common, float(ce_weight), float(weight), weight / temperature, 1 / temperature, float(softcap or 1),
            float(teacher_softcap or 1), float(scale), KIND=kind if kind in ("reverse_kl", "tinybert") else "kl",
            HAS_CE=ce_weight > 0, HAS_TEACHER=teacher is not None, IS_ONE=is_one, HAS_CAP=softcap is not None,
            HAS_TEACHER_CAP=teacher_softcap is not None, WITH_GRADIENT=grads is not None, BLOCK=block,
            STEPS=-(-width // block), num_warps=_WARPS if block > 1024 else 4,
        )  # fmt: skip


@cache
def fault(device: torch.device) -> str | None:
    """Why the kernel cannot be used on a device, in one line that is also logged; None if it can.

    Tried once a process and device, on a small example.
    """
    reason = tried(device, _wrong)
    if reason is not None:
        logger.warning(f"The distillation loss takes PyTorch's operations on {device}: {reason}")
    return reason


def _wrong(device: torch.device) -> bool:
    """Whether loss or gradient of two rows, one of which is ignored, are wrong."""
    student = torch.linspace(-2, 2, 20, device=device).view(2, 10)
    teacher, labels = student.flip(1).contiguous(), torch.tensor([3, -100]).to(device)
    losses, grads = torch.empty(2, device=device), torch.empty_like(student)
    loss_rows(student, teacher, labels, losses, grads, ce_weight=0.5, kl_weight=0.5)
    log_s, log_t = F.log_softmax(student[:1], 1), F.log_softmax(teacher[:1], 1)
    loss = F.nll_loss(log_s, labels[:1]) / 2 + F.kl_div(log_s, log_t, reduction="sum", log_target=True) / 2
    grad = log_s.exp() - (F.one_hot(labels[:1], 10) + log_t.exp()) / 2
    found, expected = torch.cat([losses, grads.flatten()]), torch.cat([loss.view(1), loss.new_zeros(1), grad.flatten()])
    expected = torch.cat([expected, expected.new_zeros(10)])
    return not torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
