"""The disk that a run takes in its output folder, and whether it is there when the run starts."""

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from ast_sparse.config import RunConfig
from ast_sparse.errors import UserError
from ast_sparse.planning.plan import Plan
from ast_sparse.storage.space import GIB, free_bytes


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes.

    Attributes:
        model: of the trained model and, if there is one, the start.
        checkpoint: of one checkpoint.
        checkpoints: how many are there at the same time: the oldest goes when a new one is complete.
        saves_model: False: `model` is the start alone.
    """

    model: int
    checkpoint: int
    checkpoints: int
    saves_model: bool = True

    @classmethod
    def of(cls, config: RunConfig, args: TrainingArguments, plan: Plan, saves_model: bool = True) -> "Disk":
        """What a configuration needs; the SLoRB of the model, the tokenizer and records are left out.

        Args:
            saves_model: whether the run saves what it has trained.
        """
        weights, pruned = plan.sparsity.total_parameters, plan.sparsity.pruned_parameters
        moments = 0 if args.save_only_model else 8 * weights
        if moments and config.optimizer.moments == "8bit":
            moments -= 6 * pruned
        masks = pruned + pruned // 8  # now, and at the start
        model = plan.start_bytes + (4 * weights if saves_model else 0)
        return cls(model, 4 * weights + masks + moments, _checkpoints(args, plan.steps), saves_model)

    def line(self) -> str:
        """What is needed, in words."""
        size = f"{self.needed / GIB:.1f} GiB"
        what = "the model" if self.saves_model else "the start"
        if not self.checkpoints:
            return f"disk: about {size} for {what}"
        many = "a checkpoint" if self.checkpoints == 1 else f"{self.checkpoints} checkpoints"
        return f"disk: about {size} for {what} and {many} of {self.checkpoint / GIB:.1f} GiB"

    @property
    def needed(self) -> int:
        """Bytes at the same time."""
        return self.model + self.checkpoints * self.checkpoint

    def check(self, output: Path, replaced: int) -> str:
        """`line`, with what is free if that is not enough for all checkpoints.

        Args:
            output: the folder, which need not exist.
            replaced: bytes in it that the run replaces.

        Raises:
            UserError: not even the model and one checkpoint have room.
        """
        free = free_bytes(output) + replaced
        if free < self.model + min(self.checkpoints, 1) * self.checkpoint:
            raise UserError(
                f"training.output_dir={str(output)!r} has {free / GIB:.1f} GiB free, and the run needs "
                f"{self.line().removeprefix('disk: ')}. Make room, or give another --output-dir."
            )
        if free < self.needed:
            return f"{self.line()}, but {free / GIB:.1f} GiB are free: make room, or lower training.save_total_limit"
        return self.line()


def _checkpoints(args: TrainingArguments, steps: int | None) -> int:
    if args.save_strategy == "no":
        return 0
    most = args.save_total_limit
    if most is not None:
        kept = 1 if args.metric_for_best_model is None else 2  # the newest, and the best, whatever the limit
        most = max(most, kept) + 1
    if args.save_strategy != "steps" or steps is None:
        return most or 1
    interval = args.save_steps if args.save_steps >= 1 else max(1, round(args.save_steps * steps))
    saves = math.ceil(steps / interval)
    return saves if most is None else min(saves, most)
