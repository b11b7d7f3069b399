"""The output folder of a run: whether it may be used, what is kept of an earlier run, and the results in it."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Literal

from transformers import TrainingArguments
from transformers.utils import logging

from ast_sparse.config import RunConfig
from ast_sparse.config.yaml12 import dump_yaml, read_yaml
from ast_sparse.distributed.ranks import gather, rank
from ast_sparse.errors import UserError
from ast_sparse.run.precision import is_undecided
from ast_sparse.run.stages import Measured
from ast_sparse.storage.files import ADAPTER_FOLDER, is_same, read_json, write_json
from ast_sparse.storage.run_folder import (
    FOUND_RATES,
    MASK_HISTORY,
    METRICS,
    REPLAY,
    REPORT,
    RESOLVED_CONFIG,
    SAMPLES,
    SHORT_RUNS,
    START,
)
from ast_sparse.storage.stage_results import RESULTS, Stages, is_result, write_stages
from ast_sparse.training.resume.checkpoints import (
    checkpoint_folders,
    checkpoint_to_continue,
    resolve_checkpoint,
)
from ast_sparse.training.resume.same_run import differences, plain

logger = logging.get_logger(__name__)

_WEIGHTS = "model*.safetensors*"


def output_folder(config: RunConfig, output_dir: str | None) -> Path:
    """`output_dir`, or `training.output_dir`.

    Raises:
        UserError: it is missing, a file, cannot be written to, or is the model or the teacher itself.
    """
    folder = output_dir or config.training.get("output_dir")
    if not folder:
        raise UserError("training.output_dir is missing. Set it, or give --output-dir.")
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"Output folder {str(path)!r} is a file. Give another --output-dir.")
    above = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"Output folder {str(path)!r}: {str(above)!r} cannot be written to. Give another --output-dir.")
    for key in ("name_or_path", "teacher"):
        model = getattr(config.model, key)
        if model is not None and path.is_dir() and is_same(Path(model).expanduser(), path):
            raise UserError(f"Output folder {str(path)!r} is model.{key}, and would be replaced. Give another folder.")
    return path


def run_state(output: Path) -> Literal["new", "started", "finished"]:
    """How far the run in an output folder has come; "new" if the folder holds none.

    The results of the retrained model are the last thing that every run writes; a run that is resumed removes them.
    """
    if not (output / RESOLVED_CONFIG).exists() and not checkpoint_folders(output):
        return "new"
    try:
        is_finished = any(map(is_result, read_json(output / RESULTS)))
    except UserError:  # missing, or damaged
        is_finished = False
    return "finished" if is_finished else "started"


def check_finished(output: Path, config: RunConfig) -> None:
    """Raise UserError if a finished run had other settings: its result is not that of this configuration."""
    was = {name: plain(values) for name, values in read_yaml(output / RESOLVED_CONFIG).items()}
    defaults = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    before = was.get("training") or {}
    training = {**{name: defaults.get(name) for name in before}, **config.training}
    if is_undecided(config.training):  # the run has decided it
        training["bf16"] = before.get("bf16", False)
    lengths = {"training.max_steps", "training.num_train_epochs"}
    differences(output, was, plain({**config.to_dict(), "training": training}), lengths)


def checkpoint_to_resume(output: Path, resume: str | bool | None) -> Path | None:
    """The checkpoint to continue from; None to start from the beginning, also if a run has no checkpoint yet.

    Every process must call this.
    """
    if not resume:
        return None
    if resume is True and (last := checkpoint_to_continue(output)) is not None:
        return last
    if resume is True and gather((output / RESOLVED_CONFIG).exists())[0]:
        if rank() == 0:
            logger.warning(f"{output} has a run without a complete checkpoint: it starts from the beginning.")
        return None
    return resolve_checkpoint(output, resume)


def refuse_used(output: Path) -> None:
    """Raise UserError if the folder has more than what `--find-lr` found, and what it left when it was killed."""
    if output.is_dir() and any(path.name not in (FOUND_RATES, SHORT_RUNS) for path in output.iterdir()):
        what = "a run" if (output / RESOLVED_CONFIG).exists() or checkpoint_folders(output) else "files"
        raise UserError(
            f"Output folder {str(output)!r} already has {what}. Continue it with --resume, replace it with "
            "--overwrite, or give another --output-dir."
        )


def clear_for_run(config: RunConfig, output: Path, checkpoint: Path | None, overwrite: bool) -> None:
    """Prepare the output folder for this run: remove what is stale, write the configuration.

    A start stays: it says itself what it was made from, and may be used again.
    """
    shutil.rmtree(output / SHORT_RUNS, ignore_errors=True)
    if overwrite:
        _remove_run(output)
    if checkpoint is not None and is_same(checkpoint.parent, output):
        _remove_newer(checkpoint)
    _write_config(config, output)


def _remove_run(output: Path) -> None:
    """Remove files of an earlier run that this one might not overwrite; other files stay."""
    for folder in checkpoint_folders(output):
        shutil.rmtree(folder)
    for name in (MASK_HISTORY, METRICS, RESULTS, SAMPLES, "trainer_state.json"):
        (output / name).unlink(missing_ok=True)
    for name in (REPLAY, REPORT):
        shutil.rmtree(output / name, ignore_errors=True)
    for weights in output.glob(_WEIGHTS):
        weights.unlink()
    shutil.rmtree(output / ADAPTER_FOLDER, ignore_errors=True)


def replaced_bytes(output: Path, overwrite: bool) -> int:
    """Bytes in the folder that a new run replaces: its start, and with `overwrite` checkpoints and weights too."""
    folders = [output / START, output / SHORT_RUNS, *(checkpoint_folders(output) if overwrite else ())]
    files = [path for folder in folders for path in folder.rglob("*")] + [*(output.glob(_WEIGHTS) if overwrite else ())]
    return sum(path.stat().st_size for path in files if path.is_file())


def _remove_newer(checkpoint: Path) -> None:
    """Remove checkpoints after the one that is resumed, half-written or abandoned: a later --resume would use them."""
    for folder in checkpoint_folders(checkpoint.parent):
        if is_same(folder, checkpoint):
            return
        logger.warning(f"{folder} is removed: the run continues from {checkpoint.name}.")
        shutil.rmtree(folder)


def _write_config(config: RunConfig, output: Path) -> None:
    """The resolved configuration: enough to repeat the run."""
    output.mkdir(parents=True, exist_ok=True)
    tree = config.to_dict()
    tree["training"] = {**config.training, "output_dir": str(output)}
    text = dump_yaml(tree)
    (output / RESOLVED_CONFIG).write_text(text, encoding="utf-8")


def read_rows(output: Path, config: RunConfig) -> Stages:
    """The results of the stages before training, if they were measured with the settings of this run."""
    try:
        rows = read_json(output / RESULTS)
        before = read_yaml(output / RESOLVED_CONFIG)["evaluation"]
        now = config.evaluation.to_dict()
        if any(before.get(key) != now[key] for key in ("datasets", "seq_len", "windows", "prompts")):
            return {}
        return {stage: rows[stage] for stage in rows if not stage.startswith("retrained")}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, UserError):
        return {}


def read_samples(output: Path, stages: Stages) -> dict[str, dict[str, str]]:
    """The saved continuations of the stages whose results were read, by stage and prompt."""
    try:
        samples = read_json(output / SAMPLES)
        return {stage: dict(samples[stage]) for stage in stages if stage in samples}
    except (OSError, ValueError, TypeError, UserError):
        return {}


def write_results(output: Path, rows: Stages, measured: Measured) -> None:
    """Write the results of all stages so far, and their continuations if a report is wanted."""
    write_stages(output, rows)
    if measured.samples:
        write_json(output / SAMPLES, measured.samples)
