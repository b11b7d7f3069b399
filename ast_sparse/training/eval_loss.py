"""The loss over held-out rows, each counted once, whatever the number of processes."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.distributed.ranks import mean_over_ranks


class HeldOutLoss:
    """Mean cross-entropy over the tokens of an evaluation.

    Trainer averages the means of batches: rows that fill up the last batch on several processes count there, and a row
    with few labels counts as much as any. Here every token of the text counts once.

    Args:
        dataloader: of one evaluation; without a length no row is taken for a filler.
    """

    def __init__(self, dataloader: DataLoader, args: TrainingArguments) -> None:
        self.rows = len(dataloader.dataset) if has_length(dataloader.dataset) else None
        self.batch_size = args.eval_batch_size
        self.ranks, self.rank = args.world_size, args.process_index
        self._batches = 0
        self._sums: Tensor | None = None  # loss and tokens

    def add(self, by_position: Tensor, labels: Tensor) -> None:
        """Add this process's next batch.

        Args:
            by_position: `[batch · seq]`, the loss of each position.
            labels: `[batch, seq]`, shifted; −100 does not count.
        """
        first = (self._batches * self.ranks + self.rank) * self.batch_size  # batches are dealt out in turns
        self._batches += 1
        count = len(labels) if self.rows is None else max(0, min(len(labels), self.rows - first))
        losses = by_position.view_as(labels)[:count]
        dtype = torch.float32 if labels.device.type == "mps" else torch.float64
        sums = torch.stack([losses.sum(dtype=dtype), (labels[:count] != IGNORE_INDEX).sum().to(dtype)])
        self._sums = sums if self._sums is None else self._sums + sums

    def mean(self) -> float | None:
        """The loss over the tokens of all processes, which must all call this; None if there were none."""
        if self._sums is None:
            return None
        loss, tokens = mean_over_ranks(self._sums).tolist()
        return loss / tokens if tokens else None
