"""Which block of which domain each training sample is (Sheared LLaMA's dynamic batch loading, paper Sec. 7).

Samples are numbered over the whole run: step s takes the samples `[s · batch, (s+1) · batch)`, however many processes
and micro-batches share them. The shares at that step divide [0, 1) among the domains. Sample i belongs to the domain in
whose part a hash of (seed, i) falls, and is the next block in that domain's order. So the whole sequence follows from
the seed and the history of the shares, and that is all a checkpoint keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from ast_sparse.config import MixtureConfig
from ast_sparse.data.blocks.collator import DOMAIN
from ast_sparse.data.blocks.order import BlockOrder, mix, seed_key

_CHUNK = 2**16  # samples that are counted at once


class DomainBlocks(Sequence[dict[str, Any]]):
    """The blocks of several domains as one data set; each row has the index of its domain.

    Args:
        parts: packed blocks by the name of the domain, rows `{"input_ids": ...}` of one length.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = dict(parts)
        self.offsets = np.asarray([0, *accumulate(len(part) for part in self.parts.values())], dtype=np.int64)
        self._parts = list(self.parts.values())

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        domain = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return {**self._parts[domain][int(index - self.offsets[domain])], DOMAIN: domain}


@dataclass(frozen=True)
class ShareChange:
    """Shares that are in force from a step on.

    Attributes:
        step: the first step they apply to.
        shares: of the domains, in their order.
        losses: held-out losses they were computed from; None for those the run starts with.
    """

    step: int
    shares: tuple[float, ...]
    losses: tuple[float, ...] | None = None


class Mixture:
    """The samples of a training run, step by step.

    Args:
        blocks: how many each domain has, by name; at least 1 each.
        shares: at the start, in the order of `blocks`; they sum to 1.
        seed: for the order of blocks and for drawing domains.
        batch: samples in a step, over all processes and micro-batches.
    """

    def __init__(self, blocks: Mapping[str, int], shares: Sequence[float], seed: int, batch: int) -> None:
        self.names = tuple(blocks)
        self.blocks = np.asarray(list(blocks.values()), dtype=np.int64)
        self.seed = seed
        self.batch = batch
        self.history = [ShareChange(0, tuple(shares))]
        self._key = np.uint64(seed_key(seed, "domain of a sample"))
        self._orders = [BlockOrder(count, seed_key(seed, "blocks", name)) for name, count in blocks.items()]
        self._counted = (0, np.zeros(len(self.names), dtype=np.int64))  # step, blocks used before it

    def shares_at(self, step: int) -> tuple[float, ...]:
        """The shares by which the samples of `step` are drawn."""
        return next(change.shares for change in reversed(self.history) if change.step <= step)

    def change_shares(self, step: int, shares: Sequence[float], losses: Sequence[float]) -> None:
        """Use other shares from `step` on; this replaces changes at `step` or later."""
        self.history = [change for change in self.history if change.step < step]
        self.history.append(ShareChange(step, tuple(shares), tuple(losses)))
        if self._counted[0] > step:
            self._counted = (0, np.zeros_like(self.blocks))

    def samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Domain and block of each sample of a step: int64 `[batch]` each."""
        used = self.used(step)
        domains = self._domains(step * self.batch, self.batch, self.shares_at(step))
        blocks = np.empty_like(domains)
        for domain, order in enumerate(self._orders):
            places = np.flatnonzero(domains == domain)
            if len(places):
                blocks[places] = order(np.arange(used[domain], used[domain] + len(places)))
        self._counted = (step + 1, used + self._count(domains))
        return domains, blocks

    def used(self, step: int) -> np.ndarray:
        """How many blocks of each domain the steps before `step` take: int64 `[domains]`."""
        counted, used = self._counted if self._counted[0] <= step else (0, np.zeros_like(self.blocks))
        while counted < step:
            later = [change.step for change in self.history if change.step > counted]
            end = min([step, counted + max(1, _CHUNK // self.batch), *later])
            shares = self.shares_at(counted)
            domains = self._domains(counted * self.batch, (end - counted) * self.batch, shares)
            counted, used = end, used + self._count(domains)
        return used

    def _count(self, domains: np.ndarray) -> np.ndarray:
        return np.bincount(domains, minlength=len(self.names)).astype(np.int64)

    def _domains(self, first: int, count: int, shares: Sequence[float]) -> np.ndarray:
        bits = mix(mix(np.arange(first, first + count, dtype=np.uint64)) ^ self._key) >> np.uint64(11)
        uniform = bits.astype(np.float64) * 2.0**-53
        borders = np.cumsum(shares)
        last = int(np.flatnonzero(shares)[-1])  # rounding may leave the last border below 1
        return np.minimum(np.searchsorted(borders, uniform, side="right"), last).astype(np.int64)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: JSON values."""
        return {
            "seed": self.seed,
            "batch": self.batch,
            "domains": dict(zip(self.names, self.blocks.tolist(), strict=True)),
            "history": [asdict(change) for change in self.history],
        }

    def load_history(self, state: Mapping[str, Any]) -> None:
        """Continue with the shares of a checkpoint.

        Raises:
            ValueError, KeyError, TypeError: the state is damaged.
        """
        history = [_change(change, len(self.names)) for change in state["history"]]
        steps = [change.step for change in history]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError("steps")
        self.history = history
        self._counted = (0, np.zeros_like(self.blocks))


def _change(content: Mapping[str, Any], domains: int) -> ShareChange:
    shares, losses = content["shares"], content["losses"]
    if not isinstance(content["step"], int) or len(shares) != domains or len(losses or shares) != domains:
        raise ValueError("shares")
    shares = tuple(float(share) for share in shares)
    if not all(share >= 0 for share in shares) or abs(math.fsum(shares) - 1) > 1e-6:
        raise ValueError("shares")
    return ShareChange(content["step"], shares, None if losses is None else tuple(float(loss) for loss in losses))


def updated_shares(
    shares: Sequence[float], losses: Sequence[float], targets: Sequence[float], config: MixtureConfig
) -> tuple[float, ...]:
    """The shares after an evaluation (paper Sec. 7).

    doremi: `w' = softmax(log w + η·(loss − target))`; bandit: `w' = softmax(w + η·(loss − target))`; then
    `w = (1−c)·w' + c/n`. With `clip` a loss below its target counts as equal to it, as in Sheared LLaMA's paper.
    constant: unchanged.

    Args:
        losses, targets: of the domains, held out, in nats per token.
    """
    if config.type == "constant":
        return tuple(shares)
    excess = [loss - target for loss, target in zip(losses, targets, strict=True)]
    excess = [max(value, 0.0) for value in excess] if config.clip else excess
    if config.type == "doremi":
        scores = [
            math.log(share) + config.rate * value if share else -math.inf
            for share, value in zip(shares, excess, strict=True)
        ]
    else:
        scores = [share + config.rate * value for share, value in zip(shares, excess, strict=True)]
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    total = math.fsum(weights)
    return tuple((1 - config.floor) * weight / total + config.floor / len(weights) for weight in weights)
