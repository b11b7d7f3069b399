"""The Triton kernel of the distillation loss. Importing this file imports triton; `loss_rows.py` does so.

A program has one row. It reads the row of both models twice: after the first pass it knows the loss, in the second it
writes the gradient. Sums are kept relative to the largest logit of their model so far, and corrected when a larger one
comes. So large logits lose no digits, and nothing becomes infinite.

Sums are vectors of BLOCK entries, which are added up after the loop. So all that the threads of a program have to
exchange in a step are the largest logits of its columns.

The number of steps is a constant, because the interpreter cannot loop up to a number that is an argument. A chunk of
rows may start anywhere in `labels` and `losses`, so the kernel must not depend on how their addresses are aligned
(`do_not_specialize`): it would be compiled again.
"""

# mypy: disable-error-code="no-untyped-def"
# what Triton compiles has its own types: tensors of `tl`, and `tl.constexpr`

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e38)  # below every logit; the difference of two of them is finite, and e to its power is 0
IGNORED = tl.constexpr(-100)


@triton.jit
def _tanh(x):
    """tanh and its derivative, to about 2e-7 of their values.

    Near zero tanh is its series, where `1 − e^(−2|x|)` would lose digits, as `1 − tanh²` would far from zero.
    """
    squared = x * x
    small = x * (1 + squared * (-1 / 3 + squared * (2 / 15 + squared * (-17 / 315 + squared * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    large = (1 - e) / (1 + e)
    t = tl.where(squared < 0.0625, small, tl.where(x < 0, -large, large))
    return t, 4 * e / ((1 + e) * (1 + e))


@triton.jit
def _logits(row, column, inside, softcap, HAS_CAP: tl.constexpr):
    """Logits in float32, LOWEST where not `inside`, and the derivative of the soft cap."""
    x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    slope = tl.zeros_like(x) + 1
    if HAS_CAP:
        t, slope = _tanh(x / softcap)
        x = softcap * t
    return tl.where(inside, x, LOWEST), slope


@triton.jit
def _top(x, top):
    """The largest number so far, with those of `x`, and how much it has grown."""
    larger = tl.maximum(top, tl.max(x, 0))
    return larger, larger - top


# long: the two passes of one kernel, which share a dozen numbers
@triton.jit(do_not_specialize=["labels", "losses"])
def distil_rows(
    student, teacher, grads, labels, losses, student_stride, teacher_stride, grads_stride, width, common,
    ce_weight, kl_weight, gradient_weight, inverse_temperature, softcap, teacher_softcap, scale,
    KIND: tl.constexpr, HAS_CE: tl.constexpr, HAS_TEACHER: tl.constexpr, IS_ONE: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_TEACHER_CAP: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The loss of each row, and its gradient with respect to the student's logits before their soft cap.

    Args:
        student, teacher, grads: rows of at least `width`, `common` and `width` entries, with their strides. `grads` may
            be `student`: only the program that reads a row overwrites it.
        labels: int64; where −100, loss and gradient are 0, and the logits are not read.
        losses: float32.
        width: columns of the student, which the cross-entropy is over.
        common: columns of both models, which the divergence is over.
        kl_weight, gradient_weight: factors of the divergence and of its gradient.
        scale: factor of the whole gradient.
        KIND: "kl", "reverse_kl" or "tinybert".
        IS_ONE: cross-entropy and divergence have the same probabilities of the student: T is 1 and `common` is `width`.
        BLOCK, STEPS: columns of a step, and their number.
    """
    at = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + at)
    student += at * student_stride
    teacher += at * teacher_stride
    grads += at * grads_stride
    if label == IGNORED:
        tl.store(losses + at, 0.0)
        if WITH_GRADIENT:
            for step in range(STEPS):
                column = step * BLOCK + tl.arange(0, BLOCK)
                tl.store(grads + column, tl.zeros((BLOCK,), grads.dtype.element_ty), mask=column < width)
    else:
        is_column = (label >= 0) & (label < width)
        wanted = tl.load(student + label, mask=is_column, other=float("nan")).to(tl.float32)
        if HAS_CAP:
            capped, _slope = _tanh(wanted / softcap)
            wanted = softcap * capped
        # without a suffix: of the student at T = 1, for the cross-entropy; _s, _t: of student and teacher at T
        top = tl.full((), LOWEST, tl.float32)
        top_s = tl.full((), LOWEST, tl.float32)
        top_t = tl.full((), LOWEST, tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        sums_s = tl.zeros((BLOCK,), tl.float32)
        sums_t = tl.zeros((BLOCK,), tl.float32)
        compared = tl.zeros((BLOCK,), tl.float32)
        for step in range(STEPS):
            column = step * BLOCK + tl.arange(0, BLOCK)
            z, _ = _logits(student, column, column < width, softcap, HAS_CAP)
            if HAS_CE and not IS_ONE:
                top, growth = _top(z, top)
                sums = sums * tl.exp(-growth) + tl.exp(z - top)
            if HAS_TEACHER:
                both = column < common
                r, _ = _logits(teacher, column, both, teacher_softcap, HAS_TEACHER_CAP)
                r = tl.where(both, r * inverse_temperature, LOWEST)
                s = tl.where(both, z * inverse_temperature, LOWEST)
                top_s, growth_s = _top(s, top_s)
                top_t, growth_t = _top(r, top_t)
                e_s, e_t = tl.exp(s - top_s), tl.exp(r - top_t)
                shrunk_s, shrunk_t = tl.exp(-growth_s), tl.exp(-growth_t)
                if KIND == "reverse_kl":  # Σ e_s ((s − top_s) − (r − top_t))
                    moved = compared + sums_s * (growth_t - growth_s)
                    compared = moved * shrunk_s + e_s * ((s - top_s) - (r - top_t))
                elif KIND == "tinybert":  # Σ e_t (top_s − s)
                    compared = (compared + sums_t * growth_s) * shrunk_t + e_t * (top_s - s)
                else:  # Σ e_t ((r − top_t) − (s − top_s))
                    moved = compared + sums_t * (growth_s - growth_t)
                    compared = moved * shrunk_t + e_t * ((r - top_t) - (s - top_s))
                sums_s = sums_s * shrunk_s + e_s
                sums_t = sums_t * shrunk_t + e_t
        total, total_s, total_t = tl.sum(sums, 0), tl.sum(sums_s, 0), tl.sum(sums_t, 0)
        if IS_ONE:
            top, total = top_s, total_s
        loss = tl.zeros_like(top)
        if HAS_CE:
            loss += ce_weight * (tl.log(total) - (wanted - top))
        mean = tl.zeros_like(top)
        if HAS_TEACHER:
            if KIND == "reverse_kl":
                mean = tl.sum(compared, 0) / total_s
                loss += kl_weight * (mean - tl.log(total_s) + tl.log(total_t))
            elif KIND == "tinybert":
                loss += kl_weight * (tl.sum(compared, 0) / total_t + tl.log(total_s))
            else:
                loss += kl_weight * (tl.sum(compared, 0) / total_t + tl.log(total_s) - tl.log(total_t))
        tl.store(losses + at, loss)
        if WITH_GRADIENT:
            tl.debug_barrier()  # all threads have read the row, and the label's logit, before one overwrites it
            for step in range(STEPS):
                column = step * BLOCK + tl.arange(0, BLOCK)
                z, slope = _logits(student, column, column < width, softcap, HAS_CAP)
                grad = tl.zeros((BLOCK,), tl.float32)
                if HAS_TEACHER:
                    both = column < common
                    r, _ = _logits(teacher, column, both, teacher_softcap, HAS_TEACHER_CAP)
                    r = tl.where(both, r * inverse_temperature, LOWEST)
                    s = tl.where(both, z * inverse_temperature, LOWEST)
                    p_s = tl.exp(s - top_s) * (1 / total_s)
                    if KIND == "reverse_kl":
                        grad = gradient_weight * p_s * ((s - top_s) - (r - top_t) - mean)
                    else:
                        grad = gradient_weight * (p_s - tl.exp(r - top_t) * (1 / total_t))
                    if IS_ONE:
                        grad += ce_weight * p_s
                if HAS_CE:
                    if not IS_ONE:
                        grad += ce_weight * (tl.exp(z - top) * (1 / total))
                    grad -= tl.where(column == label, ce_weight, 0.0)
                grad *= slope * scale
                tl.store(grads + column, grad.to(grads.dtype.element_ty), mask=column < width)
