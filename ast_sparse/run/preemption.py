"""A run that is asked to leave saves a checkpoint at the end of the step, and goes."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ast_sparse.distributed.ranks import any_rank, wait_for_all
from ast_sparse.run.signals import Preempted, PreemptionSignals


class PreemptionCallback(TrainerCallback):
    """Saves and leaves when a signal came to any rank; add it last, and catch `Preempted` around `train()`.

    The save is Trainer's own, after what is due at the step (masks, logs, evaluation), so the resumed run is the
    undisturbed one bit for bit. transformers' `enable_jit_checkpoint` is not: it saves before masks are refreshed and
    between the backward pass and the update, each rank by itself, knows no SIGUSR1, and ends as if training were done.

    Args:
        signals: those of `preemption_signals()`.

    Raises:
        Preempted: on all ranks, once everything is written; the text is empty on ranks that say nothing.
    """

    def __init__(self, signals: PreemptionSignals) -> None:
        self.signals = signals
        self._leaving = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signals.begin_training()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save_if_received(args, control)
        if not self._leaving and state.global_step >= state.max_steps:
            self.signals.finish()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signals.is_training:  # a signal in a long evaluation needs no further step
            self._save_if_received(args, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._leaving:
            return
        wait_for_all()  # a launcher ends the other ranks when the first one exits
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        name = "A signal to another rank" if self.signals.received is None else self.signals.received.name
        raise Preempted(f"{name}: saved {folder}; --resume continues from there." if args.should_log else "")

    def _save_if_received(self, args: TrainingArguments, control: TrainerControl) -> None:
        if not any_rank(self.signals.received is not None, args.device):
            return
        self._leaving = control.should_save = True
        args.save_only_model = False  # it would leave out what a resume needs
        if args.save_strategy == SaveStrategy.BEST:  # an evaluation at this step would take the save back
            args.save_strategy = SaveStrategy.STEPS
