"""Checks 3 and 7: the loss from hidden states, right and fast, and a whole model in bf16 beside float32."""

import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ast_sparse import DistillationConfig, SparsityConfig, chunked_distillation_loss, sparsify_model
from ast_sparse.distillation.head import OutputHead
from scripts.checks.gpu_checks.bench import Bench, Line, compared, compiled_for, cost, info, right
from scripts.checks.gpu_checks.shapes import new_model, token_ids

ALPHA = 0.67
_ROWS = 256  # of logits in float64 at a time


# ---- 7: speed ------------------------------------------------------------------------------------------------------


def loss_speed(bench: Bench) -> Iterator[Line]:
    """Forward KL from hidden states, with gradients, beside Liger's fused JSD, or beside full logits without it."""
    shapes = ((4096, 4096, 32000), (8192, 576, 49152), (4096, 2048, 128256))
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    if not has_liger:
        yield info("Liger", reason="liger_kernel is not installed: full logits, eager and compiled, are compared with")
    for shape in bench.pick(shapes, ((8, 16, 40),)):
        with compiled_for(bench):
            yield from _speed(bench, shape, has_liger)


def _speed(bench: Bench, shape: tuple[int, int, int], has_liger: bool) -> Iterator[Line]:
    problem, case = Problem(bench, *shape), "{}x{}x{}".format(*shape)
    sides: dict[str, Callable[[], Any]] = {"ours": problem.ours, "full logits": problem.full}
    candidates: dict[str, Callable[[], Any]] = {
        "compiled full logits": partial(problem.full, torch.compile(_kl_of_logits, dynamic=False))
    }
    if has_liger:
        candidates["Liger"] = problem.liger
    expected = problem.expected()
    yield _value(f"{case}, ours", problem.ours(), expected)
    for name, call in candidates.items():
        try:
            found = call()
        except Exception as error:
            yield info(f"{case}, {name}", absent=f"{type(error).__name__}: {error}"[:300])
            continue
        sides[name] = call
        yield info(f"{case}, {name}", **_errors(found, expected))
    times = bench.times(sides)
    peaks = {}
    for name, call in sides.items():
        problem.forget()
        peaks[name] = bench.peak(call)
    others = [name for name in sides if name != "ours"]
    against = "Liger" if "Liger" in sides else min(others, key=lambda name: times[name])
    yield compared(bench, f"{case}, time", times, against, 1.0)
    ours, theirs = peaks["ours"], peaks[against]
    ratio = None if ours is None or theirs is None else ours / theirs
    yield cost(bench, f"{case}, peak", ratio, 1.0, against=against, bytes=peaks)


class Problem:
    """Hidden states and heads of student and teacher, in bf16."""

    def __init__(self, bench: Bench, tokens: int, width: int, vocab: int) -> None:
        torch.manual_seed(5)
        make = partial(bench.random, dtype=torch.bfloat16)
        self.hidden, self.teacher_hidden = make(tokens, width).requires_grad_(), make(tokens, width)
        self.head, self.teacher_head = (
            nn.Linear(width, vocab, bias=False, device=bench.device, dtype=torch.bfloat16) for _ in range(2)
        )
        self.teacher_head.requires_grad_(False)
        self.labels = torch.randint(0, vocab, (tokens,), device=bench.device)
        self.tokens = tokens

    def ours(self) -> tuple[Tensor, Tensor]:
        """Loss of a token, and the gradient by the hidden states."""
        self.forget()
        config = DistillationConfig(ce_weight=0.0, kl_weight=1.0)
        pairs = (self.hidden, self.head, self.teacher_hidden, self.teacher_head)
        return self._result(chunked_distillation_loss(*pairs, self.labels, config)[0] / self.tokens)

    def full(self, kl_of_logits: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The same from full logits, as most training code has it."""
        self.forget()
        reference = self.teacher_head(self.teacher_hidden)
        return self._result((kl_of_logits or _kl_of_logits)(self.head(self.hidden), reference) / self.tokens)

    def liger(self) -> tuple[Tensor, Tensor]:
        """The same by Liger's kernel; β = 0 is the forward KL."""
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        self.forget()
        weights = (self.hidden, self.head.weight, self.teacher_hidden, self.teacher_head.weight)
        return self._result(LigerFusedLinearJSD(jsd_beta=0.0)(*weights, self.labels))

    def forget(self) -> None:
        """Free the last gradients, so that they are in no peak."""
        self.hidden.grad = self.head.weight.grad = None

    def _result(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        loss.backward()
        assert self.hidden.grad is not None
        return loss.detach(), self.hidden.grad

    @torch.no_grad()
    def expected(self) -> tuple[Tensor, Tensor]:
        """The same in float64, from the same bf16 logits."""
        loss, grads = torch.zeros((), dtype=torch.float64, device=self.hidden.device), []
        weight = self.head.weight
        for ours, theirs in zip(self.hidden.split(_ROWS), self.teacher_hidden.split(_ROWS), strict=True):
            log_s, log_t = self.head(ours).double().log_softmax(-1), self.teacher_head(theirs).double().log_softmax(-1)
            loss += (log_t.exp() * (log_t - log_s)).sum()
            grads.append((log_s.exp() - log_t.exp()).float() @ weight.float() / self.tokens)
        return loss / self.tokens, torch.cat(grads)


def _kl_of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    log_s, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True)


def _value(case: str, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Line:
    errors = _errors(found, expected)
    is_right = errors["loss"] <= 1e-3 and errors["gradient"] <= 2e-2
    return right(f"{case}, values", is_right, "loss <= 1e-3, gradient <= 2e-2 (bf16)", **errors)


def _errors(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative errors of the loss, and of the gradient by its norm."""
    loss = float((found[0].double() - expected[0]).abs() / expected[0].abs())
    gradient = float((found[1].float() - expected[1]).norm() / expected[1].norm())
    return {"loss": loss, "gradient": gradient}


# ---- 3: parity -----------------------------------------------------------------------------------------------------


def parity(bench: Bench) -> Iterator[Line]:
    """A sparse student with a teacher: bf16 autocast beside float32, and the loss beside full logits in float64."""
    name, (rows, length) = bench.pick(("SmolLM2-135M", (2, 512)), ("tiny", (2, 5)))
    student = new_model(name, bench.device)
    teacher = new_model(name, bench.device, seed=1).requires_grad_(False).eval()
    sparsify_model(student, SparsityConfig())
    ids = token_ids(name, rows, length).to(bench.device)
    full, whole = _loss_of(student, teacher, ids, None), _gradient(student)
    half, rounded = _loss_of(student, teacher, ids, torch.bfloat16), _gradient(student)
    error, cosine = abs(half / full - 1), float(F.cosine_similarity(whole, rounded, 0))
    expected = "loss <= 2e-3, cosine of the gradients >= 0.999"
    measured = dict(loss_float32=full, loss_bf16=half, error=error, cosine=cosine)
    yield right(f"{name}, bf16 beside float32", error <= 2e-3 and cosine >= 0.999, expected, **measured)
    yield _beside_full_logits(student, teacher, ids, name)
    del student, teacher
    yield from _kinds(bench)


def _loss_of(student: Any, teacher: Any, ids: Tensor, autocast: torch.dtype | None) -> float:
    student.zero_grad()
    with torch.autocast(ids.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        hidden = student.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        with torch.no_grad():
            reference = teacher.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        heads = student.lm_head, teacher.lm_head
        config = DistillationConfig(alpha=ALPHA)
        loss, count = chunked_distillation_loss(hidden, heads[0], reference, heads[1], ids[:, 1:], config)
    (loss / count).backward()
    return float((loss / count).detach())


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@torch.no_grad()
def _beside_full_logits(student: Any, teacher: Any, ids: Tensor, name: str) -> Line:
    hidden, reference = (each.model(input_ids=ids, use_cache=False).last_hidden_state for each in (student, teacher))
    hidden, reference, labels = hidden[:, :-1].flatten(0, 1), reference[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    config = DistillationConfig(alpha=ALPHA)
    loss, count = chunked_distillation_loss(hidden, student.lm_head, reference, teacher.lm_head, labels, config)
    expected = torch.zeros((), dtype=torch.float64, device=ids.device)
    for ours, theirs, own in zip(hidden.split(_ROWS), reference.split(_ROWS), labels.split(_ROWS), strict=True):
        log_s, log_t = (
            (each.double() @ model.lm_head.weight.double().t()).log_softmax(-1)
            for each, model in ((ours, student), (theirs, teacher))
        )
        kl = (log_t.exp() * (log_t - log_s)).sum()
        expected += (1 - ALPHA) * F.nll_loss(log_s, own, reduction="sum") + ALPHA * kl
    error = float((loss.double() - expected).abs() / expected.abs())
    return right(
        f"{name}, loss beside full logits in float64", error <= 1e-6, "<= 1e-6", error=error, tokens=int(count)
    )


def _kinds(bench: Bench) -> Iterator[Line]:
    """Each kind of D on logits, with temperatures, a soft cap, ignored labels and other columns, beside float64."""
    sizes = bench.pick((512, 256, 32003), (6, 16, 40))
    # kind, temperature, soft cap, columns that the teacher has beyond the student's
    cases = (("kl", 1.0, None, 0), ("kl", 2.0, None, 24), ("reverse_kl", 0.5, 30.0, 0), ("tinybert", 2.0, None, -3))
    bounds = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 3e-2)}
    for (dtype, (of_loss, of_gradient)), case in itertools.product(bounds.items(), cases):
        found, expected = _loss_of_kind(bench, dtype, sizes, *case)
        errors = _errors(found, expected)
        is_right = errors["loss"] <= of_loss and errors["gradient"] <= of_gradient
        name = f"{case[0]}, T {case[1]}, soft cap {case[2]}, {case[3]:+} columns, {dtype}, beside float64"
        yield right(name, is_right, f"loss <= {of_loss:g}, gradient <= {of_gradient:g}", **errors)


def _loss_of_kind(
    bench: Bench, dtype: torch.dtype, sizes: tuple[int, int, int], kind: Any, temperature: float,
    softcap: float | None, more: int,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """Loss and gradient by the hidden states on the device, and in float64 on the CPU."""
    torch.manual_seed(7)
    tokens, width, vocab = sizes
    config = DistillationConfig(kind=kind, ce_weight=0.5, kl_weight=1.0, temperature=temperature)
    hidden, reference = (torch.randn(tokens, width).to(dtype) for _ in range(2))
    heads = [nn.Linear(width, columns, bias=False, dtype=dtype) for columns in (vocab, vocab + more)]
    labels = torch.randint(0, vocab, (tokens,))
    labels[::3] = -100
    results = []
    for device, kept in ((bench.device, dtype), (torch.device("cpu"), torch.float64)):
        ours = hidden.to(device, kept, copy=True).requires_grad_()
        outputs = [OutputHead(copy.deepcopy(head).to(device, kept), 1.0, softcap) for head in heads]
        pairs = (ours, outputs[0], reference.to(device, kept), outputs[1])
        loss, count = chunked_distillation_loss(*pairs, labels.to(device), config)
        (loss / count).backward()
        assert ours.grad is not None
        results.append(((loss / count).detach().cpu(), ours.grad.cpu()))
    return results[0], results[1]
