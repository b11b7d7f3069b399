"""What happens to masks around an optimizer step (paper Sec. 3.2, Algorithm 1)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import CalibrationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.kernels.choice import Kernels
from ast_sparse.optim import SparseAdamW
from ast_sparse.schedules import decay_at, is_refresh_due, slorb_step, sparsity_at
from ast_sparse.sparsity.model import (
    apply_masks,
    count_kept,
    masks_by_parameter,
    refresh_masks,
    sparse_layers,
    twins,
    use_kernels,
    use_masked_weights,
)
from ast_sparse.sparsity.oneshot import METHODS
from ast_sparse.sparsity.statistics import InputRecorder
from ast_sparse.storage.run_folder import MASK_HISTORY, append_row, keep_rows_until
from ast_sparse.training.checks.baselines import check_steps
from ast_sparse.training.start.model_calls import graphs_read_copies

logger = logging.get_logger(__name__)

_STATE = "ast_sparse.refresh_waits"  # not a class name, as in `watch.py`


class SparsityCallback(TrainerCallback):
    """Sets λ before each update, refreshes masks after it, and records the flip rates.

    λ(s), the sparsity of IMP and GMP and the refreshes follow from `state.global_step` alone. A refresh that is due
    after a step without a counted token waits for the next step that has some; only whether one waits is saved for a
    resumed run. A `criterion` that needs text uses the activations of the step before the refresh.

    Args:
        config: the sparsity settings.
        log: `Trainer.log`, which feeds the progress bar, the trackers and `state.log_history`.
        calibration: SparseGPT's damping and block size.
        slorb: if SLoRB comes after the sparse training, masks stop changing when it begins.
        is_empty: returns whether the step that ends had no counted token.

    Attributes:
        kernels: the kernels for masks and updates, used from the beginning of training.
    """

    def __init__(
        self,
        config: SparsityConfig,
        log: Callable[[dict[str, float]], None],
        calibration: CalibrationConfig | None = None,
        slorb: SLoRBConfig | None = None,
        is_empty: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.log = log
        self.calibration = calibration
        self.slorb = slorb
        self.is_empty = is_empty
        self.kernels: Kernels = "eager"
        self._recorder: InputRecorder | None = None
        self._waits = False  # whether a refresh that was due waits

    @contextmanager
    def masked_weights(self, model: nn.Module) -> Iterator[None]:
        """Around a training: masked weights are kept or made as set, and no memory is used for them afterwards.

        `auto` keeps them: a run that has a plan has decided already.
        """
        use_masked_weights(model, "made" if self.config.masked_weights == "made" else "kept")
        try:
            yield
        finally:
            use_masked_weights(model, "made")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_steps(self.config, self.slorb, state.max_steps)
        optimizer = sparse_optimizer(kwargs["optimizer"])
        optimizer.bind_masks(masks_by_parameter(kwargs["model"]))
        optimizer.kernels = self.kernels
        optimizer.begin_offload(kwargs["model"])
        use_kernels(kwargs["model"], self.kernels)
        layers = sparse_layers(kwargs["model"]).values()
        of_no_effect = any(layer.is_offloaded or layer.gathered_masked or layer.dense_forward for layer in layers)
        if args.torch_compile:
            of_no_effect |= not graphs_read_copies(args.torch_compile_backend, args.torch_compile_mode)
        if (args.bf16 or args.fp16) and not of_no_effect:
            kept = self.config.masked_weights != "made"
            logger.info(f"Masked weights in 16 bits are {'kept' if kept else 'made again whenever they are needed'}.")
        self._waits = _STATE in (state.stateful_callbacks or {})
        if args.should_save:
            keep_rows_until(Path(str(args.output_dir)) / MASK_HISTORY, state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        decay = decay_at(self.config, state.global_step, state.max_steps)
        for group in sparse_optimizer(kwargs["optimizer"]).param_groups:
            group["mask_decay"] = decay
        criterion = METHODS[self.config.criterion]
        if criterion.needs_text and self._is_due(state.global_step + 1, state.max_steps):
            layers = sparse_layers(kwargs["model"])
            self._recorder = InputRecorder(layers, criterion.needs_hessian, twins(kwargs["model"], layers))
            self._recorder.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._is_due(state.global_step, state.max_steps):
            return
        if self.is_empty():
            self._wait(state, True)
            return
        self._wait(state, False)
        model: nn.Module = kwargs["model"]
        with sparse_optimizer(kwargs["optimizer"]).true_weights():
            rates = self._refresh(model, state.global_step, state.max_steps)
        masks = {name: layer.mask for name, layer in sparse_layers(model).items()}
        total = sum(mask.numel() for mask in masks.values())
        values = {
            key: sum(rates[name][i] * mask.numel() for name, mask in masks.items()) / total
            for i, key in enumerate(("flip_rate", "initial_flip_rate"))
        }
        values["mask_decay"] = decay_at(self.config, state.global_step - 1, state.max_steps)  # of the last update
        if self.config.is_gradual:
            values["sparsity"] = 1 - count_kept(model) / total
        due = control.should_log
        self.log(dict(values))
        control.should_log = due  # logging clears it, and the loss of this step would not be logged
        if args.should_save:
            layers = {name: list(rate) for name, rate in rates.items()}
            row = {"step": state.global_step, **values, "layers": layers}
            append_row(Path(str(args.output_dir)) / MASK_HISTORY, row)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        sparse_optimizer(kwargs["optimizer"]).end_offload()
        if self.config.is_gradual:  # a run that stops early is pruned to its pattern too
            refresh_masks(kwargs["model"], sparsity=self.config.final_sparsity)
        apply_masks(kwargs["model"])

    def _wait(self, state: TrainerState, waits: bool) -> None:
        """Postpone the refresh of a step and drop what was recorded for it, or note that none waits any more."""
        if waits and self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        if waits != self._waits:
            others: dict[str, Any] = dict(state.stateful_callbacks or {})  # type: ignore[arg-type]  # a mapping here
            others.pop(_STATE, None)
            state.stateful_callbacks = {**others, _STATE: {}} if waits else others  # type: ignore[assignment]
        self._waits = waits

    def _is_due(self, step: int, total_steps: int) -> bool:
        last = slorb_step(self.slorb, total_steps)
        is_due = self._waits or is_refresh_due(self.config, step, total_steps)
        return is_due and (last is None or step <= last)

    def _refresh(self, model: nn.Module, step: int, total_steps: int) -> dict[str, tuple[float, float]]:
        if self.config.is_gradual:
            return refresh_masks(model, sparsity=sparsity_at(self.config, step, total_steps), step=step)
        statistics = None
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            recorder.stop()
            statistics = recorder.reduced_statistics()
        return refresh_masks(model, self.config.criterion, statistics, calibration_config=self.calibration, step=step)


def sparse_optimizer(optimizer: Any) -> SparseAdamW:
    """The optimizer inside accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, SparseAdamW), type(inner)
    return inner
