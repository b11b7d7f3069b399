"""What does the loss (4) cost from hidden states, forward and backward, compared with KL + CE on materialised logits?

Ours: `chunked_distillation_loss` on 2048 tokens, float32, α = 0.67. Time: against the four products with a head that
any version needs (logits of both models, gradients with respect to hidden states and to the student's weight), plus
0.3 times what the plain version takes beyond them. Memory: the peak beyond inputs and returned gradients, against that
of the plain version, `F.kl_div` and `F.cross_entropy` through autograd. Interleaved, memory in child processes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.chunked import chunked_distillation_loss
from scripts.benchmarks.harness import PeakMemory, Result, Settings, interleave, main

ALPHA = 0.67
REST_SHARE, MEMORY_GOAL = 0.3, 0.15
Shape = tuple[int, int, int]


class Case:
    """Hidden states and heads of student and teacher, and labels."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        tokens, hidden, vocab = shape
        torch.manual_seed(0)
        self.student = nn.Linear(hidden, vocab, bias=False, device=device)
        self.teacher = nn.Linear(hidden, vocab, bias=False, device=device).requires_grad_(False)
        self.hidden = torch.randn(tokens, hidden, device=device, requires_grad=True)
        self.teacher_hidden = torch.randn(tokens, hidden, device=device)
        self.labels = torch.randint(0, vocab, (tokens,), device=device)

    def chunked(self) -> tuple[Tensor, ...]:
        loss, _ = chunked_distillation_loss(
            self.hidden, self.student, self.teacher_hidden, self.teacher, self.labels, DistillationConfig(alpha=ALPHA)
        )
        return torch.autograd.grad(loss, (self.hidden, self.student.weight))

    def plain(self) -> tuple[Tensor, ...]:
        student = self.student(self.hidden)
        with torch.no_grad():
            teacher = self.teacher(self.teacher_hidden)
        ce = F.cross_entropy(student, self.labels, reduction="sum")
        log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
        kl = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        return torch.autograd.grad((1 - ALPHA) * ce + ALPHA * kl, (self.hidden, self.student.weight))

    @torch.no_grad()
    def products(self) -> tuple[Tensor, ...]:
        student, teacher = self.student(self.hidden), self.teacher(self.teacher_hidden)
        return student @ self.student.weight, student.t() @ self.hidden, teacher


def peak(side: str, shape: Shape, device: torch.device) -> float:
    """MB beyond inputs and returned gradients."""
    case = Case(shape, device)
    call: Callable[[], Any] = getattr(case, side)
    with PeakMemory() as memory:
        grads = call()
    return (memory.above - sum(grad.numel() * grad.element_size() for grad in grads)) / 1e6


def measure(settings: Settings) -> Iterator[Result]:
    shapes = [(64, 16, 100)] if settings.quick else [(2048, h, v) for h in (576, 2048) for v in (49152, 128256)]
    for shape in shapes:
        case = Case(shape, settings.device)
        sides = {"chunked": case.chunked, "plain": case.plain, "products": case.products}
        times = interleave(sides, settings.pairs(20 if shape[1] * shape[2] < 1e8 else 5), warmup=1)
        floor = [p + REST_SHARE * (n - p) for p, n in zip(times["products"], times["plain"], strict=True)]
        about = dict(question="distillation loss", notes={"hidden": shape[1], "vocabulary": shape[2]})
        name = f"{shape[0]} tokens, {shape[1]} x {shape[2]}"
        against = f"products + {REST_SHARE} rest"
        yield Result.of(times["chunked"], floor, case=name, against=against, goal=1.0, **about)
        yield Result.of(times["chunked"], times["plain"], case=name, against="plain KL + CE", **about)
        yield Result.of(times["chunked"], times["products"], case=name, against="products", **about)
        del case, sides
        memory = [settings.in_child(peak, side, shape, settings.device) for side in ("chunked", "plain")]
        yield Result.of(
            memory[:1],
            memory[1:],
            case=f"{name}, memory",
            against="plain KL + CE",
            unit="MB",
            goal=MEMORY_GOAL,
            **about,
        )


if __name__ == "__main__":
    main(measure)
