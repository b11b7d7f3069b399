"""A loss that is not finite, or jumps: the run stops or skips the step, and the batch is saved for replay.

A step without a counted token makes no update either.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ast_sparse.config import WatchConfig
from ast_sparse.data.blocks.collator import DOMAIN
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.distributed.pieces import whole
from ast_sparse.distributed.ranks import mean_over_ranks, own_rank
from ast_sparse.errors import DivergenceError, UserError, one_line
from ast_sparse.storage.model_kind import without_cache
from ast_sparse.storage.run_folder import REPLAY
from ast_sparse.training.resume.checkpoints import last_checkpoint

logger = logging.get_logger(__name__)

# not a class name: transformers would make a new instance with `restore_callback_states_from_checkpoint`
_STATE = "ast_sparse.watch"


def divergence(what: str, args: TrainingArguments, step: int, batch: Path | None = None) -> DivergenceError:
    """The error that ends a run with wrong values.

    Args:
        what: what is wrong at `step`.
        batch: the file with the batch of the step.
    """
    last = last_checkpoint(str(args.output_dir), is_read=False)
    good = f"Last good checkpoint: {last}" if last else "There is no checkpoint yet"
    kept = "" if batch is None else f" The batch: {batch}."
    return DivergenceError(
        f"Training diverged at step {step}: {what}. {good}.{kept} "
        "Lower training.learning_rate or training.max_grad_norm, then start again or resume."
    )


class WatchCallback(TrainerCallback):
    """Judges every step before its update, by the loss of all its micro-batches on all ranks.

    A skipped step leaves weights, moments and step counts as they are, while masks, learning rate and data move on.
    What later decisions depend on is saved with every checkpoint, so a resumed run decides like an uninterrupted one.

    A step in which no rank has a counted token has nothing to learn from. It is not judged, and also leaves weights,
    moments and step counts as they are; the masks wait for the next step that has such tokens (`SparsityCallback`),
    while λ, learning rate and data move on.

    The device is read once a step. What others have to know of all ranks goes with it: see `ask`.

    Attributes:
        is_empty: whether the last step had no such token.
        empty: number of such steps so far.
        ask: a question that each rank answers before an update; None asks nothing.
        agreed: whether any rank has said yes at the last step.
    """

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self._batches: list[dict[str, Any]] = []
        self._loss: Tensor | None = None
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self.skipped = 0
        self.empty = 0
        self.is_empty = False
        self._in_a_row = 0
        self._tokens: Tensor | None = None
        self._norm: Any = None
        self.ask: Callable[[], bool] | None = None
        self.agreed = False
        self._steps = [0, 0]  # since the last log record, and since this call of train() began
        self._empty_steps = [0, 0]  # those of them without a counted token
        self._lost_steps = [0, 0]  # those of them whose loss is not finite
        self._sums = [0.0, 0.0]  # of the losses of all others

    def add(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """Add a micro-batch and its loss, as Trainer adds them up."""
        tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().to(loss)
        self._batches.append(inputs)
        self._loss = loss if self._loss is None else self._loss + loss
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def see_norm(self, norm: Any) -> None:
        """Take the norm of the step's gradients before clipping, as Trainer has computed it: a tensor or a number."""
        self._norm = norm

    def log_values(self) -> dict[str, float]:
        """For the log: `skipped_steps` so far, if steps may be skipped; `empty_steps`, once there is one."""
        found: dict[str, float] = (
            {"skipped_steps": self.skipped} if "skip" in (self.config.nan, self.config.spike) else {}
        )
        return {**found, "empty_steps": self.empty} if self.empty else found

    def correct_loss(self, logs: dict[str, float], key: str = "loss", device: torch.device | None = None) -> None:
        """Replace the mean over all steps, which Trainer logs, by that over the steps with a loss; drop it if none has.

        Args:
            key: `loss`, since the last log record, or `train_loss`, since this call of train() began.
            device: of training, for `train_loss`, which is then that of all ranks; all must call this.
        """
        if device is not None and own_rank()[1] > 1:  # Trainer adds the steps after the last record by rank
            logs[key] = float(mean_over_ranks(torch.tensor(logs[key], dtype=torch.float64, device=device)))
        index = int(key != "loss")
        steps, empty, lost, total = (
            each[index] for each in (self._steps, self._empty_steps, self._lost_steps, self._sums)
        )
        self._steps[index] = self._empty_steps[index] = self._lost_steps[index] = 0
        self._sums[index] = 0.0
        if self.is_empty:
            logs.pop("grad_norm", None)
        if lost and not math.isfinite(logs[key]):  # without `logging_nan_inf_filter`
            return
        if (empty or lost) and empty + lost == steps:
            del logs[key]
        elif lost:  # which Trainer replaces on each rank by the mean so far, or by 0 if there is none
            logs[key] = total / (steps - empty - lost)
        elif empty:
            logs[key] *= steps / (steps - empty)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        saved = state.stateful_callbacks.get(_STATE) if isinstance(state.stateful_callbacks, dict) else None
        self._reset(saved or {})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._batches, self._loss, self._tokens, self._norm = [], None, None, None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the update happen, or prevent it by dropping the gradients.

        Raises:
            DivergenceError: the settings say stop.
        """
        if self._loss is None or self._tokens is None:
            return
        norm = _gradient_norm(self._norm, kwargs["optimizer"], self._loss)
        answer = self._loss.new_full((), float(self.ask is not None and self.ask()))  # not copied: that would wait
        values = torch.stack([self._loss, norm, self._tokens, answer])
        loss, norm, tokens, answers = mean_over_ranks(values).tolist()
        self.is_empty, self.agreed = tokens == 0, answers > 0
        self._steps = [steps + 1 for steps in self._steps]
        if self.is_empty:
            self._pass_over(args, state.global_step + 1, kwargs["optimizer"])
            return
        if math.isfinite(loss):
            self._sums = [total + loss for total in self._sums]
        else:
            self._lost_steps = [steps + 1 for steps in self._lost_steps]
        action, what = self._verdict(loss, norm)
        if action == "skip" and self._in_a_row == self.config.max_skips:
            action, what = "stop", f"{what}, after watch.max_skips={self._in_a_row} skipped steps in a row"
        step, path = state.global_step + 1, None
        if action != "go":
            header = {"what": what, "loss": loss, "gradient_norm": norm}
            path = self._save(args, {**header, "step": step}, kwargs["optimizer"])
        if action == "stop":
            raise divergence(what, args, step, path)
        self._in_a_row = self._in_a_row + 1 if action == "skip" else 0
        if action == "skip":
            self.skipped += 1
            _drop_update(kwargs["optimizer"])
        elif self.config.spike != "off":
            self._losses.append(loss)
        if action != "go" and args.should_log:
            done = "is skipped" if action == "skip" else "continues"
            logger.warning(f"Step {step} {done}: {what}. The batch: {path}.")

    def _pass_over(self, args: TrainingArguments, step: int, optimizer: Any) -> None:
        """Leave out the update of a step without a counted token; warn the first time."""
        self._empty_steps = [steps + 1 for steps in self._empty_steps]
        self.empty += 1
        _drop_update(optimizer)
        if self.empty == 1 and args.should_log:
            logger.warning(
                f"Step {step} has no token that the loss counts (all labels are −100), so weights, moments and masks "
                "stay as they are. This is shown once; `empty_steps` in the log counts such steps."
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batches, self._loss, self._tokens, self._norm = [], None, None, None
        if self.config.spike != "off" or self.config.nan == "skip" or self.empty:
            saved: Any = {"losses": list(self._losses), "skipped": self.skipped, "in_a_row": self._in_a_row}
            saved = {**saved, "empty": self.empty} if self.empty else saved
            state.stateful_callbacks = {**(state.stateful_callbacks or {}), _STATE: saved}  # type: ignore[assignment,dict-item]

    def _reset(self, saved: dict[str, Any]) -> None:
        self._losses = deque(saved.get("losses", ()), self.config.spike_window)
        self.skipped, self._in_a_row = saved.get("skipped", 0), saved.get("in_a_row", 0)
        self.empty, self.is_empty, self.agreed = saved.get("empty", 0), False, False
        self._steps, self._empty_steps, self._lost_steps, self._sums = [0, 0], [0, 0], [0, 0], [0.0, 0.0]

    def _verdict(self, loss: float, norm: float) -> tuple[str, str]:
        config = self.config
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return config.nan, f"{name} is {value}"
        if config.spike != "off" and len(self._losses) == config.spike_window:
            usual = statistics.median(self._losses)
            if loss > config.spike_factor * usual:
                what = f"loss is {loss:.4g}, more than watch.spike_factor={config.spike_factor:g} times {usual:.4g}"
                return config.spike, f"{what}, the median of the last {config.spike_window} steps"
        return "go", ""

    def _save(self, args: TrainingArguments, header: dict[str, Any], optimizer: Any) -> Path:
        """Save this rank's micro-batches as `replay/step-N-rank-R.safetensors`."""
        path = Path(str(args.output_dir)) / REPLAY / f"step-{header['step']}-rank-{args.process_index}.safetensors"
        settings = {"watch": self.config.to_dict(), "learning_rate": float(optimizer.param_groups[0]["lr"])}
        described = {**header, "rank": args.process_index, "micro_batches": len(self._batches), "settings": settings}
        tensors = {
            f"{index}.{name}": value.detach().cpu().contiguous()
            for index, batch in enumerate(self._batches)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        save_file(tensors, unfinished, metadata={key: json.dumps(value) for key, value in described.items()})
        unfinished.replace(path)
        return path


def load_batch(path: str | Path) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """The micro-batches of a file in `replay/`, and its header: step, rank, what was wrong, loss, settings.

    Raises:
        UserError: the file is missing, or is not one of these.
    """
    try:
        with safe_open(path, "pt") as file:
            header = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            batches: list[dict[str, Tensor]] = [{} for _ in range(header["micro_batches"])]
            for key in file.keys():  # noqa: SIM118
                index, name = key.split(".", 1)
                batches[int(index)][name] = file.get_tensor(key)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"Batch {str(path)!r} cannot be read: {one_line(error)}. Name a step-N-rank-R.safetensors of "
            f"the {REPLAY} folder of a run."
        ) from None
    return batches, header


def replay_batch(model: PreTrainedModel, path: str | Path) -> list[float]:
    """Cross-entropy of a model on each micro-batch that a run saved.

    For the loss (4) of a run, pass each of `load_batch(path)[0]` to `SparseTrainer.compute_loss`.

    Raises:
        UserError: the file cannot be read.
    """
    batches, _ = load_batch(path)
    with torch.no_grad():
        known = [{name: value for name, value in batch.items() if name != DOMAIN} for batch in batches]
        # with a cache, transformers does not see document borders in `position_ids`
        return [
            float(model(**without_cache(model), **{name: v.to(model.device) for name, v in batch.items()}).loss)
            for batch in known
        ]


def finite_loss(loss: Tensor, total: Tensor, steps: int) -> Tensor:
    """What Trainer adds to the logged loss with `logging_nan_inf_filter`, chosen on the device: Trainer waits for each.

    Args:
        loss: of a micro-batch.
        total: the sum since the last log record; `steps`: the finished steps since then.

    Returns:
        The loss; if it is not finite, `total / (1 + steps)`.
    """
    return torch.where(torch.isfinite(loss), loss, total / (1 + steps))


def _drop_update(optimizer: Any) -> None:
    """Leave the optimizer nothing to do: weights do not decay, moments and step counts do not change."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _gradient_norm(norm: Any, optimizer: Any, like: Tensor) -> Tensor:
    """The norm before clipping, on the device of `like`; 0 where it is not judged."""
    if norm is None or getattr(optimizer, "scaler", None) is not None:
        return torch.zeros_like(like)  # fp16 overflows now and then, and its scaler handles that
    return whole(norm).to(like) if isinstance(norm, Tensor) else like.new_full((), float(norm))
