"""What a run measures as it trains: every log record in a file, and speed and memory with each loss."""

import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ast_sparse.distributed.ranks import mean_over_ranks
from ast_sparse.peak import peak_bytes, reset_peak
from ast_sparse.storage.files import finite_or_none
from ast_sparse.storage.run_folder import METRICS, append_row, keep_rows_until

logger = logging.get_logger(__name__)


_PEAK_FLOPS = (  # per second, dense bf16 with float32 sums, from the vendor's data sheets; the first name that matches
    (r"\bMIG\b", None),  # a part of a GPU
    (r"H[12]00 NVL", 835.5e12),
    (r"H100 PCIe", 756.5e12),
    (r"H[12]00", 989.4e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"RTX 4090$", 165.2e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs per second of a GPU, by its name; None if it is not known."""
    return next((peak for pattern, peak in _PEAK_FLOPS if re.search(pattern, device_name)), None)


class MetricsCallback(TrainerCallback):
    """Writes every record of `Trainer.log` to `metrics.jsonl`: step, epoch, time in seconds since 1970, values."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_save:  # a checkpoint has the number of records so far: later ones may have the same step
            keep_rows_until(Path(str(args.output_dir)) / METRICS, state.global_step, len(state.log_history))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save:  # the progress bar removes entries from `logs`
            row = {"step": state.global_step, "epoch": state.epoch, "time": time.time(), **state.log_history[-1]}
            append_row(Path(str(args.output_dir)) / METRICS, row)
            for key, value in row.items():
                if key.startswith("eval_") and key.endswith("_loss") and finite_or_none(value) is None:
                    logger.warning(f"Step {state.global_step}: {key} is {value}: a held-out loss is not finite.")


class SpeedCallback(TrainerCallback):
    """Tokens per second of all ranks, model FLOPs utilisation and memory, for the record of each training loss.

    The time of a step counts: data, forward, backward, update, mask refresh. Evaluation, saving and trackers do not.

    Args:
        flops_per_token: of student and teacher.
    """

    def __init__(self, flops_per_token: int) -> None:
        self.flops_per_token = flops_per_token
        self._tokens = 0
        self._seconds = 0.0
        self._since: float | None = None
        self._in_step = False

    def count(self, tokens: int) -> None:
        """Add the tokens of a micro-batch."""
        self._tokens += tokens

    def log_values(self, args: TrainingArguments) -> dict[str, float]:
        """Since the last call: `tokens_per_second`, `mfu` if the speed of the GPU is known, and `memory_gib`.

        All ranks must call this. Memory is the most that this process had allocated on its GPU, or had resident on a
        CPU, in steps and whatever came between them; where the system cannot count anew, since the process began.
        """
        ranks, on_gpu = args.world_size, args.device.type == "cuda"
        tokens = float(mean_over_ranks(torch.tensor(float(self._tokens), device=args.device))) * ranks
        seconds, self._tokens, self._seconds = self._seconds, 0, 0.0
        found = {}
        if tokens and seconds > 0:
            found["tokens_per_second"] = tokens / seconds
            peak = peak_flops(torch.cuda.get_device_name(args.device)) if on_gpu and args.bf16 else None
            if peak is not None:
                found["mfu"] = tokens / seconds * self.flops_per_token / (ranks * peak)
        used = peak_bytes(on_gpu)
        reset_peak(on_gpu)
        return {**found, "memory_gib": used / 2**30}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tokens, self._seconds, self._since, self._in_step = 0, 0.0, None, False
        reset_peak(args.device.type == "cuda")  # of loading and measuring

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.monotonic() if self._since is None else self._since
        self._in_step = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.monotonic()
        self._seconds += now - (now if self._since is None else self._since)
        self._since, self._in_step = now, False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._in_step and self._since is not None:  # between steps: the time since the last one is not training
            self._since = time.monotonic()

    on_evaluate = on_save = on_log
