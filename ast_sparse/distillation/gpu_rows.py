"""The loss of rows of logits on a GPU, where ignored rows stay among the others: nothing waits for the device.

One Triton kernel does it (`ast_sparse.kernels.gpu.loss_rows`), or, where that cannot be used, one compiled by
PyTorch, or PyTorch's operations in place.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.distillation.blocks_in_place import block_loss_
from ast_sparse.distillation.terms import IGNORE_INDEX, Terms
from ast_sparse.errors import one_line
from ast_sparse.kernels.choice import compile_kernel, compiler_fault
from ast_sparse.kernels.gpu import loss_rows
from ast_sparse.kernels.gpu.dispatch import is_interpreted, setting
from ast_sparse.kernels.waits import waits

logger = logging.getLogger(__name__)

_LOWEST = -1e38  # below every logit; the difference of two of them is finite, and e to its power is 0
_EAGER_ELEMENTS = 1 << 22  # logits of one model that PyTorch's operations take at once; they make a dozen copies

_given_up: set[torch.device] = set()  # where a compiled function has failed
_planned: ContextVar[bool] = ContextVar("planned", default=False)


@contextmanager
def planned_for_gpu(enabled: bool = True) -> Iterator[None]:
    """In the block, losses of CPU tensors without data take the memory that they would take on a GPU."""
    token = _planned.set(enabled)
    try:
        yield
    finally:
        _planned.reset(token)


def is_planned_for_gpu() -> bool:
    """Whether memory is planned for a GPU, so that kernels need not run."""
    return _planned.get()


def counts_in_place(device: torch.device) -> bool:
    """Whether ignored positions stay among the others on a device, instead of being left out.

    Leaving them out saves their products, but needs their number, for which the CPU would have to wait for a GPU
    (`waits`). A CPU does the same where it stands for a GPU.
    """
    return waits(device) or is_interpreted() or is_planned_for_gpu()


def write_rows(
    logits: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    losses: Tensor,
    grads: Tensor | None,
    terms: Terms,
    *,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    scale: float = 1.0,
) -> None:
    """Write the loss of each row, and its gradient; both are 0 where the label is −100, whatever the logits are.

    Args:
        logits: `[rows, vocab]` of the student, any float dtype, before its soft cap.
        teacher: `[rows, vocab of the teacher]`, likewise; None if D has no weight.
        labels: `[rows]` int64. The loss of a label that is neither −100 nor a column is NaN.
        losses: `[rows]`, float32 or wider.
        grads: `[rows, vocab]`, for `scale` times the gradient with respect to `logits`; it may be `logits`. None if no
            gradient is needed.
        softcap, teacher_softcap: c of `c · tanh(· / c)`, which makes logits of `logits` and of `teacher`.
        scale: `gradient_scale`; 1.0 unless `grads` are in float16.
    """
    if is_planned_for_gpu():
        return  # the kernel allocates nothing
    if loss_rows.takes(logits, teacher, labels):
        loss_rows.loss_rows(
            logits, teacher, labels, losses, grads, kind=terms.kind, ce_weight=terms.ce_weight,
            kl_weight=terms.kl_weight, temperature=terms.temperature, softcap=softcap,
            teacher_softcap=teacher_softcap, scale=scale,
        )  # fmt: skip
        return
    if _compiles(logits):
        kernel = compiled_rows(terms, softcap, teacher_softcap, scale)
        if _runs(kernel, logits, teacher, labels, losses, grads):
            return
    size = max(1, _EAGER_ELEMENTS // logits.shape[-1])
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        reference, out = (None if each is None else each[part] for each in (teacher, grads))
        given = (logits[part], reference, labels[part], losses[part], out)
        _write_eagerly(*given, terms, softcap, teacher_softcap, scale)


def _write_eagerly(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, losses: Tensor, grads: Tensor | None, terms: Terms,
    softcap: float | None, teacher_softcap: float | None, scale: float,
) -> None:  # fmt: skip
    """`write_rows` of a few rows; ignored rows are computed with some label, and then made 0."""
    ignored, last = labels == IGNORE_INDEX, logits.shape[-1] - 1
    block = logits.to(losses.dtype, copy=True)
    if teacher is not None:
        teacher = _capped(teacher.to(losses.dtype), teacher_softcap)[0]
    loss = block_loss_(block, teacher, labels.clamp(0, last), terms, softcap=softcap, with_gradient=grads is not None)
    losses.copy_(loss.masked_fill_((labels < 0) | (labels > last), float("nan")).masked_fill_(ignored, 0))
    if grads is not None:
        grads.copy_(block if scale == 1 else block.mul_(scale)).masked_fill_(ignored.unsqueeze(-1), 0)


def _runs(kernel: Callable[..., None], logits: Tensor, *others: Tensor | None) -> bool:
    """Run a compiled function; False, and a line in the log, if it fails, as it may only do with real sizes.

    It fails before its last kernel has begun, which alone writes gradients, so the logits are whole.
    """
    try:
        kernel(logits, *others)
    except torch.OutOfMemoryError:  # PyTorch's operations need more
        raise
    except Exception as error:  # of the inductor, or of Triton when it launches: shared memory, a full disk
        reason = f"compiled, it fails: {type(error).__name__}: {one_line(error, 300)}"
        logger.warning(f"The distillation loss takes PyTorch's operations on {logits.device}: {reason}")
        _given_up.add(logits.device)
        return False
    return True


def _compiles(logits: Tensor) -> bool:
    if not _is_served(logits) or logits.device in _given_up:
        return False
    return setting() != "plain" and not torch.compiler.is_compiling() and compiler_fault("cuda") is None


def _is_served(logits: Tensor) -> bool:
    return logits.is_cuda and type(logits) is Tensor and logits.dtype != torch.float64


@cache
def compiled_rows(
    terms: Terms, softcap: float | None, teacher_softcap: float | None, scale: float
) -> Callable[..., None]:
    """`rows_function`, compiled for all sizes into one kernel that keeps nothing of the size of the logits."""
    return compile_kernel(rows_function(terms, softcap, teacher_softcap, scale))


def rows_function(
    terms: Terms, softcap: float | None = None, teacher_softcap: float | None = None, scale: float = 1.0
) -> Callable[..., None]:
    """A function of logits, teacher, labels, losses and grads that does what `write_rows` says, for a compiler."""

    def rows(logits: Tensor, teacher: Tensor | None, labels: Tensor, losses: Tensor, grads: Tensor | None) -> None:
        dtype, ignored = losses.dtype, labels == IGNORE_INDEX
        z, slope = _capped(logits.to(dtype), softcap)
        loss, grad = _cross_entropy(z, labels, terms)
        if teacher is not None:
            divergence, part = _divergence(z, _capped(teacher.to(dtype), teacher_softcap)[0], terms)
            loss, grad = loss + divergence, grad + part
        losses.copy_(loss.masked_fill(ignored, 0))
        if grads is not None:
            grad = grad if slope is None else grad * slope
            grads.copy_((grad * scale).masked_fill(ignored.unsqueeze(-1), 0))

    return rows


def _capped(x: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """`c · tanh(x / c)` and its derivative."""
    if softcap is None:
        return x, None
    t = torch.tanh(x / softcap)
    return softcap * t, 1 - t * t


def _softmax(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits minus the largest, their softmax, and the logarithm of the sum that it is divided by, `[rows, 1]`."""
    shifted = x - x.amax(-1, keepdim=True)
    e = shifted.exp()
    total = e.sum(-1, keepdim=True)
    return shifted, e / total, total.log()


def _cross_entropy(z: Tensor, labels: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """`w_ce · CE` of each row and its gradient `w_ce · (p − onehot)`."""
    shifted, p, log_total = _softmax(z)
    is_label = torch.arange(z.shape[1], device=z.device) == labels.unsqueeze(-1)
    is_column = (labels >= 0) & (labels < z.shape[1])
    wanted = torch.where(is_label, shifted, 0).sum(-1).masked_fill(~is_column, float("nan"))
    return terms.ce_weight * (log_total.squeeze(-1) - wanted), terms.ce_weight * (p - is_label.to(p.dtype))


def _divergence(z: Tensor, teacher: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """`w_kl · D` of each row over the common columns, and its gradient with respect to `z`.

    Sums are relative to the largest logits, so that large logits lose no digits. Columns that the teacher lacks get a
    logit of `_LOWEST` in both models; without them tensors would have two widths, which no compiler puts in one kernel.
    """
    temperature, lacking = terms.temperature, z.shape[1] - teacher.shape[1]
    s, t = z / temperature, teacher[:, : z.shape[1]] / temperature
    if lacking > 0:
        s = s.masked_fill(torch.arange(z.shape[1], device=z.device) >= teacher.shape[1], _LOWEST)
        t = F.pad(t, (0, lacking), value=_LOWEST)
    s, p_s, log_s = _softmax(s)
    t, p_t, log_t = _softmax(t)
    weight = terms.kl_weight if terms.kind == "tinybert" else terms.kl_weight * temperature**2
    if terms.kind == "reverse_kl":
        mean = (p_s * (s - t)).sum(-1, keepdim=True)
        loss, part = mean - log_s + log_t, p_s * (s - t - mean)
    elif terms.kind == "tinybert":
        loss, part = log_s - (p_t * s).sum(-1, keepdim=True), p_s - p_t
    else:
        loss, part = (p_t * (t - s)).sum(-1, keepdim=True) + log_s - log_t, p_s - p_t
    return weight * loss.squeeze(-1), weight / temperature * part
