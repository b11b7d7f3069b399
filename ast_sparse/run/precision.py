"""`training.bf16: auto` decided once for all processes; TrainingArguments takes only true or false."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ast_sparse.config import RunConfig
from ast_sparse.distributed.ranks import gather
from ast_sparse.errors import UserError
from ast_sparse.kernels.bf16 import multiplies_in_bf16
from ast_sparse.training.resume.checkpoints import stored_bf16

_AUTO = "auto"


def is_undecided(training: Mapping[str, Any]) -> bool:
    """Whether a section `training` leaves the precision to the machine."""
    return bool(training.get("bf16") == _AUTO)


def without_auto(training: Mapping[str, Any]) -> dict[str, Any]:
    """The section without `bf16: auto`, for arguments that are built before it is decided.

    Raises:
        UserError: fp16 is on as well.
    """
    if is_undecided(training) and training.get("fp16"):
        raise UserError("training.bf16='auto' and training.fp16=True exclude each other. Remove one of them.")
    return {key: value for key, value in training.items() if key != "bf16" or value != _AUTO}


def decide_bf16(
    config: RunConfig, device: torch.device, checkpoint: Path | None, dry_run: bool
) -> tuple[RunConfig, str | None]:
    """The configuration with true or false for `training.bf16: auto`, and a line that says which and why.

    A resumed run continues as its checkpoint, on every machine. A new one uses bf16 where the device of the first
    process multiplies in bf16 by itself. A dry run plans for a GPU, unless `training.use_cpu` is set. With bf16 on a
    CPU the result has `use_cpu` too, which TrainingArguments asks for. All processes must call this.

    Args:
        device: of this process.

    Returns:
        The configuration itself, and None, if nothing is left to decide.
    """
    training = config.training
    if not is_undecided(training):
        return config, None
    bf16, reason = gather(_choice(training, device, checkpoint, dry_run))[0]
    decided = {**training, "bf16": bf16}
    if bf16 and device.type == "cpu" and not dry_run:
        decided["use_cpu"] = True
    precision = "bf16 autocast" if bf16 else "float32"
    return replace(config, training=decided), f"precision: {precision} (training.bf16=auto: {reason})"


def _choice(
    training: Mapping[str, Any], device: torch.device, checkpoint: Path | None, dry_run: bool
) -> tuple[bool, str]:
    if checkpoint is not None:
        stored = stored_bf16(checkpoint)
        return bool(stored), f"{checkpoint} {'does not say' if stored is None else 'was trained so'}"
    if dry_run and not training.get("use_cpu"):
        if not torch.cuda.is_available():
            return True, "planned for a GPU with bf16; training.use_cpu=true plans for this CPU"
        device = torch.device("cuda")
    return multiplies_in_bf16(device)
