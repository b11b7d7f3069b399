"""Which forward products make steps faster on this GPU: `sparsity.semi_structured`."""

import statistics
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import OptimizerConfig, SparsityConfig
from ast_sparse.distributed.ranks import any_rank
from ast_sparse.errors import UserError
from ast_sparse.kernels.gpu import cusparselt
from ast_sparse.kernels.gpu.dispatch import VARIABLE, setting
from ast_sparse.sparsity.layers import SparseLayer, out_by_in
from ast_sparse.sparsity.model import sparse_layers, use_masked_weights
from ast_sparse.training.checks.semi_structured import dense_products

logger = logging.get_logger(__name__)

WARM_UPS, TIMED = 4, 16  # steps; half of them of each kind. Graphs and kernels are compiled in the first


class ForwardTrial(TrainerCallback):
    """Sets which products the forward pass uses: semi-structured ones, dense ones, or the faster of the two.

    With `auto` the first steps of each start take turns, and the kind with the smaller median stays. Their order
    (Thue-Morse) does not let steps at some interval, whose inputs are recorded, be mostly of one kind. A step counts
    from its first micro-batch to its update, without a mask refresh: the callback that refreshes masks comes after this
    one. All processes use the same kind: one that is not faster with semi-structured products decides for all. Nothing
    waits for the device until the last timed step has ended.
    """

    def __init__(self, sparsity: SparsityConfig, optimizer: OptimizerConfig) -> None:
        self.sparsity, self.optimizer = sparsity, optimizer
        self._is_on = False  # whether steps are timed
        self._begins: list[torch.cuda.Event] = []  # of the steps so far
        self._ends: list[torch.cuda.Event] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()
        choice = self.sparsity.semi_structured
        if choice == "off":
            return
        reason = self._reason(args)
        if reason is None and not any(_fits(layer) for layer in sparse_layers(kwargs["model"]).values()):
            reason = "no layer has a shape that they take."
        if any_rank(reason is not None, args.device):
            reason = reason or "another process cannot use them."
            if choice == "on":
                raise UserError(f"sparsity.semi_structured='on': there are no such products here: {reason} Set off.")
            logger.info(f"Semi-structured products: off (sparsity.semi_structured=auto: {reason.rstrip('.')}).")
            return
        self._is_on = choice == "auto"
        use_masked_weights(kwargs["model"], "kept", semi_structured=True)
        if choice == "on":
            logger.info("Semi-structured products: on (sparsity.semi_structured=on).")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._is_on:
            return
        use_masked_weights(kwargs["model"], "kept", semi_structured=_turn(len(self._begins)))
        self._begins.append(_event())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._is_on:
            return
        self._ends.append(_event())
        if len(self._ends) == WARM_UPS + TIMED:
            self._decide(kwargs["model"], args.device)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._is_on, self._begins, self._ends = False, [], []

    def _reason(self, args: TrainingArguments) -> str | None:
        """Why products stay dense; for `auto` also because a time may not decide about the bits of results."""
        reason = dense_products(self.sparsity, self.optimizer, args)
        if reason is None and self.sparsity.semi_structured == "auto":
            if setting() != "auto":
                reason = f"{VARIABLE}={setting()}"
            elif args.full_determinism:
                reason = "a time must not decide under training.full_determinism"
        return cusparselt.fault(args.device) if reason is None else reason

    def _decide(self, model: nn.Module, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times: dict[bool, list[float]] = {True: [], False: []}
        for step in range(WARM_UPS, WARM_UPS + TIMED):
            times[_turn(step)].append(self._begins[step].elapsed_time(self._ends[step]))
        with_them, without = (statistics.median(times[turn]) for turn in (True, False))
        keeps = not any_rank(with_them >= without, device)
        use_masked_weights(model, "kept", semi_structured=keeps)
        self._stop()
        logger.info(
            f"Semi-structured products: {'on' if keeps else 'off'} (sparsity.semi_structured=auto: a step takes "
            f"{with_them:.1f} ms with them and {without:.1f} ms without)."
        )


def _turn(step: int) -> bool:
    """Whether a step uses semi-structured products."""
    return step.bit_count() % 2 == 0


def _fits(layer: SparseLayer) -> bool:
    return cusparselt.fits(*out_by_in(layer.weight, layer.group_dim).shape)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
