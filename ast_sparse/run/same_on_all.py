"""That all processes of a run have the same settings, models, text and output folder: a node may have its own."""

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.utils import logging

from ast_sparse.config import ModelConfig, RunConfig
from ast_sparse.data.blocks.streaming import StreamedBlocks
from ast_sparse.distributed.ranks import errors_shared, gather, rank
from ast_sparse.errors import UserError, shown
from ast_sparse.storage.files import read_json, weight_files
from ast_sparse.storage.locate import Place, load_model_config
from ast_sparse.storage.origin import hub_commit
from ast_sparse.training.resume.fingerprints import blocks_fingerprint, config_values, file_sample
from ast_sparse.training.resume.same_run import run_settings
from ast_sparse.training.resume.writing import write_errors

logger = logging.get_logger(__name__)

_DEFAULTS = {f"training.{item.name}": item.default for item in fields(TrainingArguments) if item.default is not MISSING}
# a node may have models and text in another place, and these change nothing that processes do together
_MAY_DIFFER = {
    "model.name_or_path", "model.teacher", "data.root", "data.train", "data.eval", "calibration.data",
    "evaluation.datasets", "evaluation.data_dir", "training.output_dir", "training.run_name", "training.report_to",
    "training.hub_token", "training.log_level", "training.log_level_replica", "training.disable_tqdm",
    "training.dataloader_num_workers", "training.dataloader_pin_memory", "training.dataloader_persistent_workers",
    "training.dataloader_prefetch_factor",
}  # fmt: skip


def check_same_settings(config: RunConfig) -> None:
    """Check that all processes were given the same settings, apart from paths; every process must call this.

    Raises:
        UserError: a process has another value; on all of them.
    """
    sections = {**config.to_dict(), **run_settings(config)}
    named = {f"{section}.{key}": value for section, values in sections.items() for key, value in (values or {}).items()}
    first, *others = gather({name: _held(value) for name, value in named.items() if name not in _MAY_DIFFER})
    for process, other in enumerate(others, start=1):
        for name in {**first, **other}:
            default = _DEFAULTS.get(name)
            if first.get(name, default) != other.get(name, default):
                raise UserError(
                    f"{name}={shown(other.get(name))} on process {process} differs from {shown(first.get(name))} on "
                    "process 0. Start all processes with the same configuration and options."
                )


def _held(value: Any) -> Any:
    """What a setting holds: transformers takes some of them from a JSON file, which may lie in another place."""
    if not isinstance(value, str) or not value.endswith(".json"):
        return value
    with suppress(UserError):  # whoever reads it says what is wrong
        return read_json(Path(value).expanduser())
    return value


def check_same_models(config: RunConfig) -> None:
    """Check that all processes have the same student and teacher, wherever they lie; every process must call this.

    Compared are configurations, commits of the hub, and sizes and samples of local weight files.

    Args:
        config: has passed the checks of a plan.

    Raises:
        UserError: a process has another model; on all of them.
    """
    if len(gather(None)) == 1:
        return
    model = config.model
    is_taught = config.distillation is not None and config.distillation.needs_teacher
    has_teacher = is_taught and model.teacher is not None
    facts = {"model.name_or_path": _model_facts(model, not model.random_weights or (is_taught and not has_teacher))}
    if has_teacher:
        teacher = ModelConfig(name_or_path=str(model.teacher), trust_remote_code=model.trust_remote_code)
        facts["model.teacher"] = _model_facts(teacher)
    first, *others = gather(facts)
    for process, other in enumerate(others, start=1):
        for field in {**first, **other}:
            ours, theirs = first.get(field), other.get(field)
            if ours is None or theirs is None:
                raise UserError(
                    f"{field} is set on process {0 if theirs is None else process} and not on process "
                    f"{process if theirs is None else 0}. Set it on all of them, or on none."
                )
            for what in ours:
                if what in theirs and ours[what] != theirs[what]:
                    raise UserError(
                        f"{field}: the model on process {process} differs from that on process 0 in its {what}. Give "
                        "all nodes the same model."
                    )


def _model_facts(model: ModelConfig, reads_weights: bool = True) -> dict[str, Any]:
    """What is compared of a model: of one on the hub its commit, of one in a folder its files."""
    place = Place.find(model.name_or_path, model.gguf_file)
    found = load_model_config(
        model.name_or_path,
        revision=model.revision,
        gguf_file=model.gguf_file,
        trust_remote_code=model.trust_remote_code,
    )
    facts: dict[str, Any] = {"configuration": config_values(found)}
    if place.folder is None:
        facts["hub commit"] = hub_commit(found)
    elif reads_weights:
        weights = [place.folder / place.gguf_file] if place.gguf_file is not None else weight_files(place.folder)
        facts["weight files"] = [file_sample(file) for file in weights]
    return facts


def check_same_text(field: str, blocks: Any) -> None:
    """Check that the blocks of all processes are the same, because each takes its share of them; all must call this.

    Of a stream only the first process reads text.

    Args:
        field: names the text.
        blocks: of one kind of text; None if there is none.

    Raises:
        UserError: a process has others; on all of them.
    """
    if isinstance(blocks, StreamedBlocks) or len(gather(None)) == 1:
        return
    _compare_text(field, blocks_fingerprint(blocks))


def check_same_evaluations(names: Sequence[str], texts: Mapping[str, Sequence[str]]) -> None:
    """Check that all processes measure the same texts, because they share the windows of each; all must call this.

    Args:
        names: `evaluation.datasets`, which may be paths.
        texts: documents by name; others than these are held out of the training text.

    Raises:
        UserError: a process has others; on all of them.
    """
    contents = [json.dumps(texts[name]) if name in texts else name for name in names]
    _compare_text("evaluation.datasets", [hashlib.sha256(each.encode()).hexdigest()[:32] for each in contents])


def _compare_text(field: str, fingerprint: Any) -> None:
    first, *others = gather(fingerprint)
    for process, other in enumerate(others, start=1):
        if other != first:
            raise UserError(
                f"{field}: the text on process {process} differs from that on process 0 (fingerprints "
                f"{shown(other)} and {shown(first)}). Let all nodes see the same files."
            )


def check_same_folder(output: Path, is_sharded: bool) -> None:
    """Check that all processes see the output folder of the first one; every process must call this.

    Args:
        output: exists on the first process.
        is_sharded: each process writes its part of a checkpoint, which cannot be read without the others. If not, the
            first process writes all that matters, and one line says that another cannot continue the run.

    Raises:
        UserError: a process of a sharded run does not see it; on all of them.
    """
    marks = gather(str(output / f".{uuid.uuid4().hex}"))  # a new one, so that no node has cached that it is missing
    if len(marks) == 1:
        return
    first = Path(marks[0])
    with suppress(OSError):  # it exists, or cannot be made; a node that has cached that it is missing asks the server
        output.mkdir(parents=True, exist_ok=True)
    mark = output / first.name
    try:
        with errors_shared(), write_errors(output):
            if rank() == 0:
                mark.touch()
        is_seen = gather(mark.exists())
    finally:
        if rank() == 0:
            with suppress(OSError):  # it could not be made
                mark.unlink()
    if all(is_seen):
        return
    if is_sharded or not is_seen[rank()]:
        with suppress(OSError):  # it is not empty
            output.rmdir()
    what = f"Process {is_seen.index(False)} does not see the output folder {str(first.parent)!r} of process 0"
    if is_sharded:
        raise UserError(f"{what}, so parts of each checkpoint would lie elsewhere. Name a folder that all nodes see.")
    if rank() == 0:
        logger.warning(f"{what}: the run cannot be resumed there unless its checkpoints are copied.")
