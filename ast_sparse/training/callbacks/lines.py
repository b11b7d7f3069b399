"""Progress of training if the log is not a terminal: lines instead of Trainer's bars. Each is printed once."""

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ast_sparse.progress import progress_bar, shows_bars


class ProgressLines(ProgressCallback):
    """Like its parent, which also prints the log records, but with the bars of `ast_sparse.progress`."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.training_bar = progress_bar(
                total=state.max_steps, initial=state.global_step, desc="Training", unit="step"
            )
        self.current_step = state.global_step

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and has_length(eval_dataloader):
            bar: Any = self.prediction_bar
            if bar is None:
                bar = progress_bar(total=len(eval_dataloader), desc="Evaluating", unit="batch")
            self.prediction_bar = bar
            bar.update(1)


def use_lines(trainer: Trainer) -> None:
    """Make a trainer print lines if bars are not shown; a progress callback of the user stays.

    With `disable_tqdm`, Trainer prints the log records on every node: here only where `args.should_log` says so.
    """
    callbacks = trainer.callback_handler.callbacks
    if not shows_bars() and any(type(callback) is ProgressCallback for callback in callbacks):
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressLines())
    if not trainer.args.should_log:
        for callback in [each for each in callbacks if type(each) is PrinterCallback]:
            trainer.remove_callback(callback)
