"""Which checkpoint of a run can be resumed, and whether it belongs to the run."""

import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.distributed.ranks import errors_shared, gather, rank
from ast_sparse.errors import UserError, shown
from ast_sparse.kernels import moments8bit
from ast_sparse.kernels.choice import Kernels
from ast_sparse.storage.checksums import Stretch, shares, stretch_faults, tensor_stretches
from ast_sparse.storage.files import SPARSITY_CONFIG_NAME, check_inside, read_json, tensor_shapes, weight_files
from ast_sparse.storage.sharded import is_sharded_checkpoint, shard_stretches
from ast_sparse.storage.sharded import tensor_shapes as sharded_shapes
from ast_sparse.storage.sparsity_record import SparsityRecord
from ast_sparse.training.resume.setting_classes import kind_of

logger = logging.get_logger(__name__)

RUN_RECORD = "run.json"  # settings of the run, and fingerprints of what it read

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_MOST_EPOCHS = 10**9
_SMALL = 2**20  # bytes of a file's entry that is read at once
_ZIP_LENGTHS = 26  # where an entry's header says how long its name and its extra field are
_STATE = ("optimizer.pt", "scheduler.pt")  # in a sharded run, the optimizer is in the shards


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Folders named checkpoint-N, the newest step first; complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def faults(checkpoint: Path) -> list[str]:
    """Files that a resume needs and that are missing or damaged: every file is read and compared with its checksums.

    `trainer_state.json` is written last, so it marks a finished save. Unchanged files are not read again. For several
    processes, `checkpoint_to_continue` divides the reading.
    """
    found, stretches = faults_and_stretches(checkpoint)
    return found + stretch_faults(checkpoint, stretches)


def faults_and_stretches(checkpoint: Path) -> tuple[list[str], list[Stretch]]:
    """What is wrong with a checkpoint as far as a look at descriptions and small files shows, and what remains to be
    read and compared with its checksums."""
    found: list[str] = []
    stretches: list[Stretch] = []
    sharded = is_sharded_checkpoint(checkpoint)
    if sharded:
        found, stretches = shard_stretches(checkpoint)
    elif not any((checkpoint / name).is_file() for name in _WEIGHTS):
        found.append(f"{_WEIGHTS[0]} is missing")
    else:
        try:
            stretches += tensor_stretches(checkpoint, weight_files(checkpoint))
        except UserError as error:
            found.append(str(error).rstrip("."))
    for name in _PICKLED:
        if (checkpoint / name).exists():  # next to shards, Trainer would load it as the weights
            found.append(f"{name} is pickled, which is not read")
    states = sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    for path in (*(checkpoint / name for name in _STATE[sharded:]), *states):
        if not path.is_file():
            found.append(f"{path.name} is missing")
            continue
        fault, inside = _state_file(path, _stamp(path))
        found += [fault] if fault else []
        stretches += inside
    for name, check in ((SPARSITY_CONFIG_NAME, None), (TRAINER_STATE_NAME, _trainer_state_fault)):
        if not (checkpoint / name).is_file():
            found.append(f"{name} is missing")
            continue
        try:
            content = read_json(checkpoint / name)
        except UserError:
            found.append(f"{name} is damaged")
            continue
        if check is not None and (fault := check(content, checkpoint.name)):
            found.append(f"{name} {fault}")
    try:
        if (checkpoint / RUN_RECORD).exists():  # older ones have none
            read_json(checkpoint / RUN_RECORD)
    except UserError:
        found.append(f"{RUN_RECORD} is damaged")
    return found, stretches


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=256)
def _state_file(path: Path, stamp: tuple[int, ...]) -> tuple[str | None, list[Stretch]]:
    """What is wrong with a file of `torch.save`, and the bytes in it to be read; pickled code in it is not run.

    The format is a zip file with checksums, which torch does not check.
    """
    damaged = f"{path.name} is damaged"
    try:
        check_inside(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                return damaged, []
            stretches = [_stretch(path, archive, entry) for entry in entries]
        small = [each for each in stretches if each.size < _SMALL]
        if stretch_faults(path.parent, small):  # among them the pickle
            return damaged, []
    except UserError as error:
        return f"{path.name} {str(error).rstrip('.')}", []
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error):
        return damaged, []
    moments8bit.allow_loading()
    try:
        with safe_globals():  # allows numpy's random state, as Trainer does
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return f"{path.name} contains more than numbers, text and tensors, so it is not read", []
    except Exception:  # anything that torch raises for a damaged pickle
        return damaged, []
    markers = {"param_groups": "optimizer", "cpu": "rng_state"}  # a scheduler may have any keys
    kind = next((kind for key, kind in markers.items() if key in state), "scheduler") if isinstance(state, dict) else ""
    return (None, stretches) if kind and path.name.startswith(kind) else (damaged, [])


def _stretch(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Stretch:
    """The bytes of an entry that is not compressed; an error if the headers before them do not fit."""
    archive.open(entry).close()  # compares both headers
    with path.open("rb") as stream:
        stream.seek(entry.header_offset + _ZIP_LENGTHS)
        begin = stream.tell() + struct.calcsize("<HH") + sum(struct.unpack("<HH", stream.read(4)))
    end = begin + entry.file_size
    fault = f"{path.name} is damaged"
    return Stretch(file=path.name, begin=begin, end=end, crc=f"{entry.CRC:08x}", fault=fault, size=entry.file_size)


def _trainer_state_fault(content: dict[str, Any], name: str) -> str | None:
    try:
        state = TrainerState(**content)
    except Exception:  # unknown keys, or values of the wrong type
        return "is damaged"
    steps = (state.global_step, state.max_steps)
    if not all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in steps):
        return "is damaged"
    known = _NAME.fullmatch(name)
    if known and "global_step" in content and state.global_step != int(known[1]):
        return f"is from step {state.global_step}"
    endless = state.num_train_epochs == sys.maxsize  # Trainer sets this for a stream
    epochs = (state.epoch or 0.0, 0 if endless else state.num_train_epochs)
    if not all(isinstance(epoch, int | float) and abs(epoch) < _MOST_EPOCHS for epoch in epochs):  # false for NaN
        return "is damaged"
    return None if isinstance(state.log_history, list) else "is damaged"


def last_checkpoint(output_dir: str | Path, is_read: bool = True, but: Path | None = None) -> Path | None:
    """The newest complete checkpoint of a run; a warning names incomplete ones, which are skipped.

    Args:
        is_read: compare every byte with its checksum; False for a message that may not wait for that.
        but: a checkpoint that does not count.
    """
    for folder in (each for each in checkpoint_folders(output_dir) if each != but):
        found = faults(folder) if is_read else faults_and_stretches(folder)[0]
        if not found:
            return folder
        _warn_of(folder, found)
    return None


def _warn_of(folder: Path, found: list[str]) -> None:
    logger.warning(f"{folder} is incomplete ({', '.join(found)}): using the one before it.")


def checkpoint_to_continue(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, the same on all processes, which all must call this.

    The first process decides which there are: on a network drive the others may see older contents of the folder.

    Raises:
        UserError: the first finished checkpoint was saved with `save_only_model`.
    """
    for folder in gather(checkpoint_folders(output_dir))[0]:
        if not (found := _faults_for_all(folder)):
            return Path(folder)
        if rank() == 0:
            _warn_of(folder, found)
    return None


def _faults_for_all(checkpoint: Path) -> list[str]:
    """The faults of a checkpoint on every process, of which each reads its share; UserError if it is a model alone."""
    looked: tuple[list[str], list[Stretch]] = ([], [])
    with errors_shared():
        if rank() == 0:
            _refuse_model_only(checkpoint)
            looked = faults_and_stretches(checkpoint)
    everywhere = gather(looked)
    found, stretches = everywhere[0]
    if found:
        return list(found)
    mine = shares(stretches, len(everywhere))[rank()]
    return list(dict.fromkeys(fault for part in gather(stretch_faults(checkpoint, mine)) for fault in part))


def _refuse_model_only(folder: Path) -> None:
    """Raise UserError if a finished checkpoint was saved with `save_only_model`."""
    states = [*folder.glob("rng_state*.pth"), *(path for name in _STATE if (path := folder / name).exists())]
    is_finished = (folder / TRAINER_STATE_NAME).is_file() and (folder / SPARSITY_CONFIG_NAME).is_file()
    if is_finished and not states and any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(
            f"{str(folder)!r} has the model without optimizer, schedule and random state "
            "(training.save_only_model=true): a resume would begin at step 0. Name a checkpoint that has them, or "
            "start again with --overwrite and save_only_model: false."
        )


def resolve_checkpoint(output_dir: str | Path, resume: str | Path | bool) -> Path:
    """The checkpoint to resume: the named one, or the last complete one of `output_dir`; all processes must call this.

    Raises:
        UserError: the folder is not a complete checkpoint, was saved with `save_only_model`, or does not exist.
    """
    if resume is True:
        last = checkpoint_to_continue(output_dir)
        if last is None:
            raise UserError(
                f"Nothing to resume: {str(output_dir)!r} has no complete checkpoint-N folder. "
                "Start without --resume, or name a checkpoint."
            )
        return last
    folder = Path(str(resume))
    with errors_shared():
        if not folder.is_dir():
            raise UserError(f"Checkpoint {str(folder)!r} is not a folder. Name a checkpoint-N folder of the run.")
    if found := _faults_for_all(folder):
        raise UserError(
            f"{str(folder)!r} is not a complete training checkpoint: {', '.join(found)}. "
            "Name a checkpoint-N folder of the run."
        )
    return folder


def check_same_run(
    checkpoint: Path, sparsity: SparsityConfig, slorb: SLoRBConfig | None, layers: Iterable[str]
) -> list[str]:
    """Compare sparsity, SLoRB and pruned layers, and return lines on the differences that are allowed.

    Settings that do not change the weights may differ: some are decided by the memory of the machine.

    Args:
        sparsity, slorb, layers: settings and names of the pruned layers of the resumed run.

    Raises:
        UserError: another setting or another layer differs.
    """
    path = checkpoint / SPARSITY_CONFIG_NAME
    off = SLoRBConfig(enabled=False)
    defaults = {"sparsity": SparsityConfig().to_dict(), "slorb": off.to_dict()}
    now = {"sparsity": sparsity.to_dict(), "slorb": (slorb or off).to_dict()}
    try:
        saved = SparsityRecord.from_dict(read_json(path))
        # a setting that is newer than the checkpoint had its default there
        was = {name: {**default, **saved.settings(name)} for name, default in defaults.items()}
        differing = [
            (f"{section}.{key}", was[section][key], value)
            for section in defaults
            for key, value in now[section].items()
            if was[section][key] != value
        ]
        other_layers = saved.checkpoint_layers() ^ set(layers)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} cannot be read. The checkpoint is damaged: resume from another one.") from None
    for name, before, value in differing:
        if kind_of(*name.split(".")) == "free":
            continue
        raise UserError(
            f"{name}={value!r} differs from {shown(before)} in {str(checkpoint)!r}. Resume with the settings of the "
            "run, or start a new one with another output folder."
        )
    if other_layers:
        name = min(other_layers, key=str)
        older = (
            " Earlier versions also pruned routers and weights that the model reads directly: start such a run again."
            if other_layers <= saved.checkpoint_layers()
            else ""
        )
        raise UserError(
            f"{shown(name)} is pruned in only one of this run and {str(checkpoint)!r}. "
            f"Resume with the model and the sparsity.include/exclude of the run.{older}"
        )
    changed = [each for each in differing if each[2] != "auto"]  # which keeps what it was, or is decided later
    return [f"resume: {name} {shown(before)} -> {shown(value)}" for name, before, value in changed]


def stored_kernels(checkpoint: Path) -> Kernels:
    """The kernels that a checkpoint was trained with; eager if it is older than the choice."""
    return SparsityRecord.from_dict(read_json(checkpoint / SPARSITY_CONFIG_NAME)).kernels


def stored_bf16(checkpoint: Path) -> bool | None:
    """Whether the run of a checkpoint computed in bf16; None if the checkpoint does not say, as older ones."""
    path = checkpoint / RUN_RECORD
    settings = read_json(path).get("settings") if path.is_file() else None
    training = settings.get("training") if isinstance(settings, dict) else None
    return bool(training.get("bf16")) if isinstance(training, dict) else None


def check_same_model(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError if a pruned weight has a different shape in a checkpoint than in the trained model.

    Args:
        shapes: of the weights, by name of the layer.
    """
    if is_sharded_checkpoint(checkpoint):
        stored = sharded_shapes(checkpoint)
    else:
        files = weight_files(checkpoint)
        stored = {name: tuple(value[1]) for file in files for name, value in tensor_shapes(file).items()}
    for layer, shape in shapes.items():
        found = stored.get(f"{layer}.weight", ())
        if found != tuple(shape):
            raise UserError(
                f"`{layer}` has shape {tuple(shape)} in the model and {found} in {str(checkpoint)!r}. "
                "Resume with the model.name_or_path of the run."
            )
