"""SLoRB after the sparse training (paper Table 12)."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ast_sparse.config import SLoRBConfig
from ast_sparse.schedules import slorb_step
from ast_sparse.sparsity.model import restart_slorb
from ast_sparse.sparsity.slorb import SLoRB
from ast_sparse.training.callbacks.sparsity import sparse_optimizer


class LateSLoRB(TrainerCallback):
    """SLoRB on the converged model (Table 12): a share `slorb.start` of the steps trains without it, the rest only it.

    At first S is zero. When SLoRB begins, S is set by (6) from the pruned weights, which the mask decay has brought
    close to zero by then; masks and all other weights stay as they are. Everything follows from `state.global_step`, so
    nothing is saved for a resumed run. Gradients of frozen parameters are dropped before clipping, and SparseAdamW
    skips parameters without one. So momentum and weight decay do not move them, and DDP gets every gradient that it
    waits for.

    Args:
        config: if its `start` is 0, nothing is done.
    """

    def __init__(self, config: SLoRBConfig | None) -> None:
        self.config = config

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.config is not None and state.global_step == slorb_step(self.config, state.max_steps):
            with sparse_optimizer(kwargs["optimizer"]).true_weights():
                restart_slorb(kwargs["model"], "mean" if self.config.init == "mean" else "zero")

    def drop_gradients(self, model: nn.Module, state: TrainerState) -> None:
        """Drop the gradients of what is not trained at this step, after the backward pass of a micro-batch."""
        begin = slorb_step(self.config, state.max_steps)
        if begin is None:
            return
        slorb = {p for module in model.modules() if isinstance(module, SLoRB) for p in module.parameters()}
        for parameter in model.parameters():
            if (parameter in slorb) != (state.global_step >= begin):
                parameter.grad = None
