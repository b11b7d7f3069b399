"""Losses from hidden states beside plain ones."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ast_sparse.config import DistillationConfig
from ast_sparse.distillation.chunked import chunked_distillation_loss
from ast_sparse.distillation.head import OutputHead
from tests.distillation.plain_losses import plain_loss

VOCAB, HIDDEN, TEACHER_HIDDEN = 13, 8, 6


class Case:
    """Random hidden states and heads of both models, and labels of which some are ignored."""

    def __init__(self, dtype: torch.dtype = torch.float64, vocab: int = VOCAB, teacher_vocab: int = VOCAB, **head: Any):
        torch.manual_seed(0)
        self.hidden = torch.randn(2, 9, HIDDEN, dtype=dtype, requires_grad=True)
        self.teacher_hidden = torch.randn(2, 9, TEACHER_HIDDEN, dtype=dtype)
        self.head = OutputHead(nn.Linear(HIDDEN, vocab, dtype=dtype), **head)
        self.teacher_head = OutputHead(nn.Linear(TEACHER_HIDDEN, teacher_vocab, dtype=dtype), **head)
        self.labels = torch.randint(0, min(vocab, teacher_vocab), (2, 9))
        self.labels[0, 3] = self.labels[1, 5:] = -100

    def loss(self, config: DistillationConfig | None) -> Tensor:
        loss, tokens = chunked_distillation_loss(
            self.hidden, self.head, self.teacher_hidden, self.teacher_head, self.labels, config
        )
        assert tokens == (self.labels != -100).sum()
        return loss

    def inputs(self) -> list[Tensor]:
        return [self.hidden, *self.head.linear.parameters()]

    def plain(self, config: DistillationConfig | None) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients of copies in float64, logits whole, by autograd."""
        hidden = self.hidden.detach().double().requires_grad_()
        ours, theirs = (replace(h, linear=copy.deepcopy(h.linear).double()) for h in (self.head, self.teacher_head))
        student, teacher = logits(ours, hidden), logits(theirs, self.teacher_hidden.double())
        width = min(student.shape[-1], teacher.shape[-1])
        ce_weight, kl_weight = (1.0, 0.0) if config is None else config.weights
        loss = ce_weight * plain_loss(student, student, self.labels, None)  # over all columns
        if kl_weight > 0 and config is not None:
            soft = replace(config, alpha=None, ce_weight=0.0, kl_weight=kl_weight)
            loss = loss + plain_loss(student[..., :width], teacher[..., :width], self.labels, soft)
        return loss, list(torch.autograd.grad(loss, [hidden, *ours.linear.parameters()]))


def logits(head: OutputHead, hidden: Tensor) -> Tensor:
    values = head.linear(hidden) * head.scale
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)


def check(case: Case, config: DistillationConfig | None, tolerance: float = 1e-10) -> None:
    loss = case.loss(config)
    expected, expected_grads = case.plain(config)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, case.inputs()), expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), 3 * theirs, rtol=tolerance, atol=tolerance)
