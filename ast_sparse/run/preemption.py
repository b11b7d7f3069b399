"""A run that receives a signal saves a checkpoint at the end of the step, and exits."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ast_sparse.distributed.ranks import any_rank, own_rank, wait_for_all
from ast_sparse.run.signals import Preempted, PreemptionSignals
from ast_sparse.training.callbacks.watch import WatchCallback


class PreemptionCallback(TrainerCallback):
    """Saves and stops when any rank has received a signal; add it last, and catch `Preempted` around `train()`.

    Trainer saves as usual, after the other work of the step (masks, logs, evaluation), so the resumed run is bit for
    bit the same as an uninterrupted one (on a GPU under `full_determinism`). With transformers' `enable_jit_checkpoint`
    it would not be: it saves before masks are refreshed and between the backward pass and the update, each rank on its
    own, ignores SIGUSR1, and ends as if training were complete.

    Several processes agree by the watch's read-back of the step, so that a step waits for its device once. A signal
    that comes after it, during the update, is seen at the next step. A single process sees it at once.

    Args:
        signals: from `preemption_signals()`.
        watch: the watch of the trainer; None: processes agree in a read-back of their own at every step.

    Raises:
        Preempted: on all ranks, once everything is written; the text is empty on ranks that print nothing.
    """

    def __init__(self, signals: PreemptionSignals, watch: WatchCallback | None = None) -> None:
        self.signals = signals
        self._leaving = False
        self._watch = watch
        if watch is not None:
            watch.ask = self._is_received

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signals.begin_training()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._watch is None or own_rank()[1] == 1:
            is_any = any_rank(self._is_received(), args.device)
        else:
            is_any = self._watch.agreed
        if is_any:
            self._save(args, control)
        if not self._leaving and state.global_step >= state.max_steps:
            self.signals.finish()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a signal during a long evaluation does not wait for another step
        if self.signals.is_training and any_rank(self._is_received(), args.device):
            self._save(args, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._leaving:
            return
        wait_for_all()  # a launcher ends the other ranks as soon as one exits
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        name = "A signal to another rank" if self.signals.received is None else self.signals.received.name
        raise Preempted(f"{name}: saved {folder}; --resume continues from there." if args.should_log else "")

    def _is_received(self) -> bool:
        return self.signals.received is not None

    def _save(self, args: TrainingArguments, control: TrainerControl) -> None:
        self._leaving = control.should_save = True
        args.save_only_model = False  # it would leave out what a resume needs
        if args.save_strategy == SaveStrategy.BEST:  # an evaluation at this step would cancel the save
            args.save_strategy = SaveStrategy.STEPS
