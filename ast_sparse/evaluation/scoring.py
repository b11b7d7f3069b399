"""Losses of windows under a model, and how far it is from its teacher, a chunk of positions at a time."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

_POSITIONS_PER_CHUNK = 256  # float32 logits of this many positions exist at a time


@dataclass
class Sums:
    """Sums over the scored tokens of all windows so far."""

    windows: int = 0
    tokens: int = 0
    nll: float = 0.0  # nats
    kl: float = 0.0  # KL(teacher‖student), nats
    agreed: int = 0  # tokens where student and teacher hold the same one for the likeliest

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; inf where that overflows, nan before any token."""
        try:
            return math.exp(self.nll / self.tokens) if self.tokens else math.nan
        except OverflowError:
            return math.inf


@torch.no_grad()
def score(
    model: nn.Module,
    windows: Iterable[tuple[Any, int | Tensor]],
    count: int,
    *,
    teacher: nn.Module | None = None,
    progress: bool = True,
    label: str = "Perplexity",
) -> Sums:
    """Run windows through a model, and its teacher if there is one, and sum losses.

    Both run in eval mode, without gradients, on their own devices and in their own dtypes. The logits of one window
    exist in the model's dtype; losses and divergence are float32, summed in float64.

    Args:
        windows: token ids (int64 tensor or list) and how many of the last of them are scored, at least one and fewer
            than there are tokens; or which of those after the first are (bool `[tokens − 1]`).
        count: how many windows there are, for the progress bar.
        teacher: has the vocabulary of the model.
    """
    sums = Sums()
    with (
        eval_mode(model),
        eval_mode(teacher) if teacher is not None else nullcontext(),
        tqdm(windows, desc=label, total=count, unit="window", disable=not progress) as bar,
    ):
        for tokens, scored in bar:
            _add(sums, model, teacher, torch.as_tensor(tokens, dtype=torch.long), scored)
            bar.set_postfix_str(f"ppl {sums.perplexity:.2f}")
    return sums


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, and afterwards each as it was."""
    # Module by module: `model.train()` would wake what was frozen in eval mode inside a training model.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _add(sums: Sums, model: nn.Module, teacher: nn.Module | None, tokens: Tensor, scored: int | Tensor) -> None:
    chosen = slice(-scored, None) if isinstance(scored, int) else scored
    sums.windows += 1
    if not len(targets := tokens[1:][chosen]):
        return
    student = _logits(model, tokens, chosen)
    targets = targets.to(student.device)
    losses = [
        F.cross_entropy(part.float(), target, reduction="none").double().sum()
        for part, target in zip(student.split(_POSITIONS_PER_CHUNK), targets.split(_POSITIONS_PER_CHUNK), strict=True)
    ]
    sums.tokens += len(targets)
    sums.nll += float(torch.stack(losses).sum())
    if teacher is None:
        return
    other = _logits(teacher, tokens, chosen)
    compared = [
        _compare(ours.float(), theirs.to(ours.device).float())
        for ours, theirs in zip(student.split(_POSITIONS_PER_CHUNK), other.split(_POSITIONS_PER_CHUNK), strict=True)
    ]
    sums.kl += float(torch.stack([kl for kl, _ in compared]).sum())
    sums.agreed += int(torch.stack([agreed for _, agreed in compared]).sum())


def _logits(model: nn.Module, tokens: Tensor, chosen: slice | Tensor) -> Tensor:
    """Logits `[scored, vocab]` that predict the chosen ones of the tokens after the first."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=tokens[None].to(device), use_cache=False).logits[0, :-1]
    return logits[chosen if isinstance(chosen, slice) else chosen.to(device)]


def _compare(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Summed KL(teacher‖student) (float64) and how often the likeliest tokens agree (int64), of logits in float32."""
    log_s, log_t = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    p_t = log_t.exp()
    kl = torch.where(p_t == 0, 0, p_t * (log_t - log_s))  # 0 · log 0 = 0
    return kl.sum(-1).double().sum(), (student.argmax(-1) == teacher.argmax(-1)).sum()
