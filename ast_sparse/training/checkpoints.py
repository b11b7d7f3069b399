"""Which checkpoint of a run can be resumed, and whether it belongs to the run."""

import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from transformers.utils import logging

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.export.files import SPARSITY_CONFIG_NAME, tensor_shapes, weight_files

logger = logging.get_logger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_STATE = ("optimizer.pt", "scheduler.pt")


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """Folders named checkpoint-N, the newest step first; complete or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def faults(checkpoint: Path) -> list[str]:
    """What a resume needs and the folder lacks, or holds cut off; only headers are read.

    `trainer_state.json` is written last, so it marks a finished save.
    """
    found = []
    if not any((checkpoint / name).is_file() for name in _WEIGHTS):
        found.append(f"{_WEIGHTS[0]} is missing")
    else:
        try:
            weight_files(checkpoint)
        except UserError as error:
            found.append(str(error).rstrip("."))
    states = sorted(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    for path in (*(checkpoint / name for name in _STATE), *states):
        if not path.is_file():
            found.append(f"{path.name} is missing")
        elif not zipfile.is_zipfile(path):  # what torch.save writes, its directory at the end
            found.append(f"{path.name} is damaged")
    for name in (SPARSITY_CONFIG_NAME, "trainer_state.json"):
        try:
            is_object = isinstance(json.loads((checkpoint / name).read_text(encoding="utf-8")), dict)
        except (OSError, ValueError):
            is_object = False
        if not is_object:
            found.append(f"{name} is {'damaged' if (checkpoint / name).is_file() else 'missing'}")
    return found


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run; half-written ones are named in a warning and passed over."""
    for folder in checkpoint_folders(output_dir):
        found = faults(folder)
        if not found:
            return folder
        logger.warning(f"{folder} is incomplete ({', '.join(found)}): the checkpoint before it is taken.")
    return None


def resolve_checkpoint(output_dir: str | Path, resume: str | Path | bool) -> Path:
    """The checkpoint to resume: the named one, or the last complete one of `output_dir`.

    Raises:
        UserError: the folder is no complete checkpoint, or there is none.
    """
    if resume is True:
        last = last_checkpoint(output_dir)
        if last is None:
            raise UserError(
                f"Nothing to resume: {str(output_dir)!r} holds no complete checkpoint-N folder. "
                "Start without --resume, or name a checkpoint."
            )
        return last
    folder = Path(str(resume))
    if not folder.is_dir():
        raise UserError(f"Checkpoint {str(folder)!r} is no folder. Name a checkpoint-N folder of the run.")
    if found := faults(folder):
        raise UserError(
            f"{str(folder)!r} is no complete training checkpoint: {', '.join(found)}. "
            "Name a checkpoint-N folder of the run."
        )
    return folder


def check_same_run(
    checkpoint: Path, sparsity: SparsityConfig, slorb: SLoRBConfig | None, layers: Iterable[str]
) -> None:
    """Raise UserError if a checkpoint was made with other sparsity or SLoRB settings, or another pruned layer set.

    Args:
        sparsity, slorb, layers: settings and names of the pruned layers of the run that resumes.
    """
    path = checkpoint / SPARSITY_CONFIG_NAME
    off = SLoRBConfig(enabled=False)
    defaults = {"sparsity": SparsityConfig().to_dict(), "slorb": off.to_dict()}
    now = {"sparsity": sparsity.to_dict(), "slorb": (slorb or off).to_dict()}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        # a setting that came after the checkpoint was written had its default
        was = {name: {**default, **(saved[name] or {})} for name, default in defaults.items()}
        differing = [
            (f"{section}.{key}", was[section][key], value)
            for section in defaults
            for key, value in now[section].items()
            if was[section][key] != value
        ]
        other_layers = set(saved["layers"]) ^ set(layers)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} cannot be read. The checkpoint is damaged: resume from another one.") from None
    if differing:
        name, before, value = differing[0]
        raise UserError(
            f"{name}={value!r} differs from {before!r} in {str(checkpoint)!r}. Resume with the settings of the run, "
            "or start a new one with another output folder."
        )
    if other_layers:
        raise UserError(
            f"{sorted(other_layers)[0]!r} is pruned in only one of this run and {str(checkpoint)!r}. "
            "Resume with the model and the sparsity.include/exclude of the run."
        )


def check_same_model(checkpoint: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError if a pruned weight has another shape in a checkpoint than in the model that is trained.

    Args:
        shapes: of the weights, by name of the layer.
    """
    stored = {name: value for file in weight_files(checkpoint) for name, value in tensor_shapes(file).items()}
    for layer, shape in shapes.items():
        found = tuple(stored.get(f"{layer}.weight", ("", []))[1])
        if found != tuple(shape):
            raise UserError(
                f"`{layer}` of the model has shape {tuple(shape)}, in {str(checkpoint)!r} {found}. "
                "Resume with the model.name_or_path of the run."
            )
