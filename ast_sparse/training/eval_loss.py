"""The loss over held-out rows, each counted once, on any number of processes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length

from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.distributed.pieces import reshard
from ast_sparse.distributed.ranks import mean_over_ranks
from ast_sparse.errors import UserError
from ast_sparse.training.checkpointing import CheckpointTrainer

_LARGEST_EXPONENT = 700.0  # exp of more overflows


class HeldOutLoss:
    """Mean cross-entropy over the tokens of an evaluation.

    Trainer averages the means of batches: rows that fill up the last batch on several processes count too, and a row
    with few labels counts as much as any other. Here every token of the text counts once.

    Args:
        dataloader: of one evaluation. If its data has no length, the process that reads it for all of them says how
            many rows its last batch has.

    Raises:
        UserError: as `check_readable`.
    """

    def __init__(self, dataloader: DataLoader, args: TrainingArguments) -> None:
        self.rows = len(dataloader.dataset) if has_length(dataloader.dataset) else None
        self._reader = dataloader if isinstance(dataloader, DataLoaderDispatcher) else None
        if isinstance(dataloader, DataLoaderShard):  # of accelerate; the user's own may give each process its rows
            check_readable(dataloader.dataset, args)
        self.ranks, self.rank = args.world_size, args.process_index
        self._seen = 0  # rows of all processes
        self._sums: Tensor | None = None  # loss and tokens
        self.tokens = 0.0  # once `mean` was called: those of all processes, divided by their number

    def add(self, by_position: Tensor, labels: Tensor) -> None:
        """Add this process's next batch; those of the others have as many rows.

        Args:
            by_position: `[batch · seq]`, the loss of each position.
            labels: `[batch, seq]`, shifted; −100 does not count.
        """
        left = self.ranks * len(labels) if self.rows is None else self.rows - self._seen
        if self.rows is None and self._reader is not None and self._reader.end_of_dataloader:
            left = self._reader.remainder  # the rows of the last batch
        self._seen += self.ranks * len(labels)
        # batches, or pieces of one, go to the ranks in turn
        count = max(0, min(len(labels), left - self.rank * len(labels)))
        losses = by_position.view_as(labels)[:count]
        dtype = torch.float32 if labels.device.type == "mps" else torch.float64
        sums = torch.stack([losses.sum(dtype=dtype), (labels[:count] != IGNORE_INDEX).sum().to(dtype)])
        self._sums = sums if self._sums is None else self._sums + sums

    def mean(self) -> float | None:
        """The loss over the tokens of all processes, which must all call this; None without tokens."""
        if self._sums is None:
            return None
        loss, self.tokens = mean_over_ranks(self._sums).tolist()
        return loss / self.tokens if self.tokens else None

    def replace_in(self, metrics: dict[str, float] | None, prefix: str) -> None:
        """Replace Trainer's loss, which would be 0 if no token counts, by the mean, and add its perplexity.

        All processes must call this.
        """
        loss = self.mean()
        if metrics is not None and loss is not None:
            metrics.update(with_perplexity(loss, prefix))
        elif metrics is not None:
            metrics.pop(f"{prefix}_loss", None)


def check_readable(held_out: Any, args: TrainingArguments) -> None:
    """Raise UserError for data without a length that each of several processes reads by itself.

    accelerate fills up their last batch with rows that have counted already, and nothing says how many.

    Args:
        held_out: a data set, a mapping of them, or None.
    """
    parts = held_out.values() if isinstance(held_out, dict) else [held_out]
    if args.world_size == 1 or all(part is None or has_length(part) for part in parts):
        return
    if cast(Any, args.accelerator_config).dispatch_batches is False:
        raise UserError(
            "training.accelerator_config.dispatch_batches=False: on several processes an eval_dataset without a length "
            "would count some rows twice. Remove the setting, or pass a data set with a length."
        )


def with_perplexity(loss: float, prefix: str) -> dict[str, float]:
    """A loss and its perplexity as metrics of that prefix."""
    return {f"{prefix}_loss": loss, f"{prefix}_perplexity": perplexity_of(loss)}


def perplexity_of(loss: float) -> float:
    """exp of a mean loss; the largest that fits if it overflows."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


def loss_of_parts(
    metrics: Mapping[str, float], held_out: Any, prefix: str, tokens: Mapping[str, float]
) -> float | None:
    """The loss over all parts of a mapping, from that of each; None if one is missing, or for a single data set.

    Args:
        tokens: that count, by the prefix of the part.

    Raises:
        UserError: one data set was evaluated, and no token of it is counted, so there is no loss.
    """
    if isinstance(held_out, dict):
        return _mean_loss(metrics, [f"{prefix}_{name}" for name in held_out], tokens)
    if f"{prefix}_loss" not in metrics:
        raise UserError(
            f"There is no {prefix}_loss: no token of the data to evaluate on is counted, all labels are −100. "
            "Pass rows with labels."
        )
    return None


def _mean_loss(metrics: Mapping[str, float], parts: Sequence[str], tokens: Mapping[str, float]) -> float | None:
    losses = {part: metrics.get(f"{part}_loss") for part in parts}
    if not all(isinstance(loss, float) for loss in losses.values()):
        return None
    total = math.fsum(loss * tokens[part] for part, loss in losses.items() if loss is not None)
    return total / math.fsum(tokens[part] for part in parts)


class EvaluationTrainer(CheckpointTrainer):
    """Trainer whose evaluations give the loss over all tokens, each counted once."""

    _held_out_loss: HeldOutLoss | None = None  # while an evaluation runs
    _held_out_tokens: Mapping[str, float] = {}  # of the evaluations so far, by their prefix
    _needs_logits = True  # if outputs are returned

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_readable(self.eval_dataset, self.args)

    @contextmanager
    def _all_rows(self) -> Iterator[None]:
        """`dataloader_drop_last` is for training alone, since every held-out row counts."""
        drops_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops_last

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in Trainer, but no row is dropped."""
        with self._all_rows():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As in Trainer, but no row is dropped."""
        with self._all_rows():
            return super().get_test_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in Trainer; the loss is the mean over all tokens, each counted once, and has its perplexity beside it."""
        self.prepare_student()
        self._held_out_loss = HeldOutLoss(dataloader, self.args)
        try:
            with self._settings_of_trainer():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            self._held_out_loss.replace_in(output.metrics, metric_key_prefix)
            self._held_out_tokens = {**self._held_out_tokens, metric_key_prefix: self._held_out_loss.tokens}
        finally:
            self._held_out_loss = None
            reshard(self.student)
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """As in Trainer; logits are computed only if they are needed."""
        self._needs_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._needs_logits = True

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As in Trainer; for a mapping there is also the loss over all its parts.

        Raises:
            UserError: no token of the data is counted, so there is no loss.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        parts = self.eval_dataset if eval_dataset is None else eval_dataset
        loss = loss_of_parts(metrics, parts, metric_key_prefix, self._held_out_tokens)
        if loss is not None:
            total = with_perplexity(loss, metric_key_prefix)  # the parts were logged and announced one by one
            self.log(total)
            metrics.update(total)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, total)
        return metrics
