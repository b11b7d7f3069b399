"""Fine-tuning a sparse model with any Trainer: its layers stay N:M."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ast_sparse.errors import UserError
from ast_sparse.sparsity.kept import KeptSparsity, keep_sparsity
from ast_sparse.storage.origin import source_folder
from ast_sparse.storage.sparsity_record import SparsityRecord

logger = logging.get_logger(__name__)


class KeepSparsityCallback(TrainerCallback):
    """Keeps the N:M layers of a model N:M in `transformers.Trainer`, TRL's `SFTTrainer` and others built on them.

    The masks are the zeros of the weights when training begins. Gradients of pruned weights are zero before they are
    clipped, and the weights are masked after each step. A weight that is exactly zero when a checkpoint is saved is
    pruned from then on. So a resumed run has the masks of an uninterrupted one without a file for them, and zeros never
    become weights. When training ends, every layer is checked to be N:M.

    Args:
        pattern: N:M of the weights; default: what `sparsity_config.json` of the model's folder says, otherwise 2:4.

    Attributes:
        kept: the layers and their masks while the model is trained, otherwise None. If training ends in an error it
            stays, so that `train` can go on; `kept.remove()` lets the weights be trained without masks.
    """

    def __init__(self, pattern: str | None = None) -> None:
        self.pattern = pattern
        self.kept: KeptSparsity | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        if self.kept is not None:  # the last training ended in an error
            self.kept.remove()
        if args.deepspeed_plugin is not None or any(
            isinstance(module, FullyShardedDataParallel) for module in model.modules()
        ):
            raise UserError(
                "DeepSpeed and FSDP1 flatten weights, so their masks would be lost. Train with DDP (torchrun) or FSDP2."
            )
        config = getattr(model, "config", None)
        folder = source_folder(config) if isinstance(config, PreTrainedConfig) else None
        record = SparsityRecord() if folder is None else SparsityRecord.read(folder)
        self.kept = keep_sparsity(model, self.pattern or record.pattern, record.layers)
        logger.info("%d layers stay %s", len(self.kept.layers), self.kept.pattern)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.kept is not None:
            self.kept.apply()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.kept is not None:
            self.kept.settle()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.kept is not None:
            kept, self.kept = self.kept, None
            kept.remove()
            kept.check()
