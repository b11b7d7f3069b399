"""Losses of windows under a model, and how far it is from its teacher, a chunk of positions at a time."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ast_sparse.distillation.head import OutputHead, UnknownHeadError, find_output_head, hidden_states
from ast_sparse.distillation.logits import Terms, loss_rows_
from ast_sparse.distributed.pieces import is_sharded, reshard
from ast_sparse.distributed.ranks import gather, own_rank
from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.progress import progress_bar
from ast_sparse.storage.model_kind import check_direction, check_outputs, without_cache

_POSITIONS_PER_CHUNK = 256  # logits of this many positions exist at a time
_CROSS_ENTROPY = Terms.of(None)


@dataclass
class Sums:
    """Sums over the scored tokens of all windows so far."""

    windows: int = 0
    tokens: int = 0
    nll: float = 0.0  # nats
    kl: float = 0.0  # KL(teacher‖student), nats
    agreed: int = 0  # tokens where student and teacher find the same one likeliest
    bad_window: int | None = None  # first window, from 1, whose loss is not finite
    bad_kl_window: int | None = None  # first window, from 1, whose divergence is not finite

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; inf if that overflows, nan before any token."""
        try:
            return math.exp(self.nll / self.tokens) if self.tokens else math.nan
        except OverflowError:
            return math.inf

    @staticmethod
    def over(parts: Sequence["Sums"]) -> "Sums":
        """The sums over the windows of several processes, in their order; `bad_window` counts all windows."""
        return Sums(
            windows=sum(part.windows for part in parts),
            tokens=sum(part.tokens for part in parts),
            nll=sum(part.nll for part in parts),
            kl=sum(part.kl for part in parts),
            agreed=sum(part.agreed for part in parts),
            bad_window=_first(part.bad_window for part in parts),
            bad_kl_window=_first(part.bad_kl_window for part in parts),
        )


def _first(windows: Iterable[int | None]) -> int | None:
    return min((window for window in windows if window is not None), default=None)


@torch.no_grad()
def score(
    model: nn.Module,
    windows: Iterable[tuple[Any, int | Tensor]],
    count: int,
    *,
    teacher: nn.Module | None = None,
    shared: bool = False,
    progress: bool = True,
    label: str = "Perplexity",
) -> Sums:
    """Run windows through a model, and its teacher if there is one, and sum losses.

    Both run in eval mode, without gradients, on their own devices and in their own dtypes. Logits exist for a
    chunk of positions in the model's dtype; losses and divergence are float32, summed in float64.

    With several processes the windows can be shared: they go to the processes in turn, and each process returns the
    sums over all of them. All processes must call this with the same windows. A model that FSDP2 has sharded is
    gathered in every forward pass by all processes together, so its windows are always shared, and a process that has
    no window left runs one again, which does not count.

    Args:
        windows: token ids (int64 tensor or list) and how many of them, from the end, are scored: at least one and fewer
            than there are tokens; or which of those after the first are scored (bool `[tokens − 1]`).
        count: how many windows there are, for the progress bar.
        teacher: has the model's tokens; extra ones at the end of either vocabulary are not compared.
        shared: each process has the whole model, and they share the windows.
    """
    sums, together = Sums(), any(is_sharded(each) for each in (model, teacher) if each is not None)
    rank, ranks = own_rank() if shared or together else (0, 1)
    scored_by = _Scored(model), None if teacher is None else _Scored(teacher)
    with (
        eval_mode(model),
        eval_mode(teacher) if teacher is not None else nullcontext(),
        fast_forward(model, teacher),
        progress_bar(desc=label, total=count, unit="window", disable=not progress or rank > 0) as bar,
    ):
        for first, turn in _turns(windows, ranks):
            if rank < len(turn):
                tokens, scored = turn[rank]
                _add(sums, *scored_by, torch.as_tensor(tokens, dtype=torch.long), scored, first + rank, together)
            elif together:
                tokens, scored = turn[0]
                _add(Sums(), *scored_by, torch.as_tensor(tokens, dtype=torch.long), scored, first, together)
            bar.update(len(turn))
            bar.set_postfix_str(f"ppl {sums.perplexity:.2f}")  # of this process's windows
    for each in (model, teacher) if together else ():
        if each is not None:
            reshard(each)
    return Sums.over(gather(sums)) if ranks > 1 else sums


def _turns(windows: Iterable[Any], ranks: int) -> Iterator[tuple[int, list[Any]]]:
    """The windows in groups of one for each process, the last one maybe smaller, with the number of the first, from 1.

    Every process reads all windows, so that an error in one of them is raised by all, and none waits for another.
    """
    iterator, first = iter(windows), 1
    while turn := list(islice(iterator, ranks)):
        yield first, turn
        first += len(turn)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode, and afterwards each as it was."""
    # Module by module: `model.train()` would also switch modules that were in eval mode inside a training model.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Scored:
    """A model whose logits exist for a chunk of positions at a time, if its head is recognised."""

    def __init__(self, model: nn.Module) -> None:
        check_outputs(model)
        check_direction(getattr(model, "config", None), type(model).__name__)
        self.model = model
        self.device = next(model.parameters()).device
        self.head: OutputHead | None = None
        with suppress(UnknownHeadError):  # then it computes all logits at once
            self.head = find_output_head(model)

    def parts(self, tokens: Tensor, chosen: slice | Tensor) -> Iterator[Tensor]:
        """Logits `[positions, vocab]` that predict the chosen ones of the tokens after the first, in chunks."""
        inputs: dict[str, Any] = dict(input_ids=tokens[None].to(self.device), **without_cache(self.model))
        if self.head is None:
            states = self.model(**inputs).logits
        else:
            with hidden_states(self.head) as captured:
                self.model(**inputs)
            states = captured[0]
        states = states[0, :-1][chosen if isinstance(chosen, slice) else chosen.to(self.device)]
        for part in states.split(_POSITIONS_PER_CHUNK):
            yield part if self.head is None else self.head.logits(part)


def _add(
    sums: Sums,
    model: _Scored,
    teacher: _Scored | None,
    tokens: Tensor,
    scored: int | Tensor,
    number: int,
    together: bool,
) -> None:
    """Add window `number`; one of which nothing is scored runs only if other processes wait for it (`together`)."""
    chosen = slice(-scored, None) if isinstance(scored, int) else scored
    sums.windows += 1
    if not len(targets := tokens[1:][chosen]):
        for each in (model, teacher) if together else ():
            if each is not None:
                list(each.parts(tokens, chosen))
        return
    sums.tokens += len(targets)
    theirs = iter(()) if teacher is None else teacher.parts(tokens, chosen)
    nll, kl, agreed = [], [], []
    for ours, target in zip(model.parts(tokens, chosen), targets.split(_POSITIONS_PER_CHUNK), strict=True):
        if teacher is not None:
            compared = _compare(ours.float(), next(theirs).to(ours.device).float())
            kl.append(compared[0])
            agreed.append(compared[1])
        nll.append(loss_rows_(ours, None, target.to(ours.device), _CROSS_ENTROPY, with_gradient=False).double().sum())
    loss = float(torch.stack(nll).sum())
    sums.nll += loss
    if sums.bad_window is None and not math.isfinite(loss):
        sums.bad_window = number
    if teacher is not None:
        divergence = float(torch.stack(kl).sum())
        sums.kl += divergence
        if sums.bad_kl_window is None and not math.isfinite(divergence):
            sums.bad_kl_window = number
        sums.agreed += int(torch.stack(agreed).sum())


def _compare(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Summed KL(teacher‖student) (float64) and how often the likeliest tokens agree (int64), of logits in float32.

    If one model has more columns than the other (padding of the vocabulary), over those that both have.
    """
    width = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[..., :width], teacher[..., :width]
    log_s, log_t = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    p_t = log_t.exp()
    kl = torch.where(p_t == 0, 0, p_t * (log_t - log_s))  # 0 · log 0 = 0
    return kl.sum(-1).double().sum(), (student.argmax(-1) == teacher.argmax(-1)).sum()
