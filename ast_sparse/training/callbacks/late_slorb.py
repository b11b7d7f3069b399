"""Baselines that need the length of a run: IMP, GMP, and SLoRB after the sparse training (paper Sec. 6, Table 12)."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ast_sparse.config import SLoRBConfig
from ast_sparse.schedules import slorb_step
from ast_sparse.sparsity.model import restart_slorb
from ast_sparse.sparsity.slorb import SLoRB


class LateSLoRB(TrainerCallback):
    """SLoRB on the converged model (Table 12): a share `slorb.start` of the steps without it, then it alone is trained.

    Until then S is zero. When SLoRB begins, S is made by (6) from the pruned weights, which the mask decay has brought
    close to zero by then; masks and all other weights stay as they are. Everything follows from `state.global_step`, so
    a resumed run needs nothing saved. The frozen parameters lose their gradients before these are clipped and are
    passed over by SparseAdamW, so they need no other hooks, momentum and weight decay do not move them, and DDP finds
    every gradient it waits for.

    Args:
        config: with `start` above 0; with 0 nothing is done.
    """

    def __init__(self, config: SLoRBConfig | None) -> None:
        self.config = config

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.config is not None and state.global_step == slorb_step(self.config, state.max_steps):
            restart_slorb(kwargs["model"], self.config.init)

    def drop_gradients(self, model: nn.Module, state: TrainerState) -> None:
        """Take the gradients of what is not trained at this step, after the backward pass of a micro-batch."""
        begin = slorb_step(self.config, state.max_steps)
        if begin is None:
            return
        slorb = {p for module in model.modules() if isinstance(module, SLoRB) for p in module.parameters()}
        for parameter in model.parameters():
            if (parameter in slorb) != (state.global_step >= begin):
                parameter.grad = None
