"""Sharded training checkpoints: folders of `torch.distributed.checkpoint`, which any number of processes can read.

In addition to what every training checkpoint has, `pytorch_model_fsdp_0/` holds weights, masks and SLoRB under the
names of the state dict, and `optimizer_0/` the moments. Each process writes one file; `.metadata` says what is where.
`.metadata` is pickled, and so are the values of the optimizer's groups: they are read here first, by readers that build
nothing but numbers, text and descriptions of tensors. `shards.json` has a CRC-32 of every file.
"""

import io
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata

from ast_sparse.errors import UserError, one_line
from ast_sparse.storage import files
from ast_sparse.storage.checksums import Stretch, file_sum, stretch_faults

MODEL_FOLDER = "pytorch_model_fsdp_0"
OPTIMIZER_FOLDER = "optimizer_0"
SUMS_NAME = "shards.json"

_COMPANIONS = (files.CONFIG_NAME, "generation_config.json", files.SPARSITY_CONFIG_NAME)
_METADATA = ".metadata"
_FILE_NAME = re.compile(r"__(\d+)_\d+\.distcp")
_LARGEST_METADATA = 2**30
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", *(name for name, each in vars(torch).items() if isinstance(each, torch.dtype))},
}  # fmt: skip


class _MetadataReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a description of tensors")
        return super().find_class(module, name)


def _memory_format(kind: Any, name: str) -> Any:
    """What is read instead of `getattr`: Python 3.11.2 pickles a member of an enumeration as `getattr(kind, name)`."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"an attribute of {kind!r} is not part of a description of tensors")
    return kind[name]


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether a folder holds the weights of a sharded run, complete or not."""
    return (folder / MODEL_FOLDER).is_dir()


def shard_faults(checkpoint: Path) -> list[str]:
    """What is missing or damaged in the folders of a sharded checkpoint; every file is read. Nothing pickled is run."""
    found, stretches = shard_stretches(checkpoint)
    return found or stretch_faults(checkpoint, stretches)


def shard_stretches(checkpoint: Path) -> tuple[list[str], list[Stretch]]:
    """What is wrong with the folders as far as a look at their descriptions shows, and what remains to be read."""
    found = []
    for name in (MODEL_FOLDER, OPTIMIZER_FOLDER):
        if not (checkpoint / name / _METADATA).is_file():
            found.append(f"{name}/{_METADATA} is missing")
        elif fault := _fault(checkpoint / name, _stamps(checkpoint / name)):
            found.append(f"{name}/{fault}")
    if found or not (checkpoint / SUMS_NAME).is_file():
        return found or [f"{SUMS_NAME} is missing"], []
    try:
        expected = files.read_json(checkpoint / SUMS_NAME)["files"]
        there = {str(path.relative_to(checkpoint)): path.stat().st_size for path in _files(checkpoint)}
        if there.keys() != expected.keys():
            return [f"{min(there.keys() ^ expected.keys(), key=str)} is missing, or was added"], []
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return [f"{SUMS_NAME} is damaged"], []
    return [], [_stretch(name, size, expected[name]) for name, size in there.items()]


def _stretch(name: str, size: int, crc: Any) -> Stretch:
    written_by = _FILE_NAME.search(name)
    fault = f"{name} does not have the checksum it was written with"
    # a resumed run of as many processes reads the pieces that each of them wrote
    owner = int(written_by[1]) if written_by else None
    everywhere = name.endswith(_METADATA)
    return Stretch(file=name, crc=str(crc), fault=fault, size=size, owner=owner, everywhere=everywhere)


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for name in (MODEL_FOLDER, OPTIMIZER_FOLDER) for path in (checkpoint / name).iterdir())


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model in a checkpoint without `shard_faults`, by its name in the state dict."""
    known = _metadata(checkpoint / MODEL_FOLDER).state_dict_metadata
    shapes = {name: tuple(each.size) for name, each in known.items() if isinstance(each, TensorStorageMetadata)}
    return {name.partition(".")[2]: shape for name, shape in shapes.items()}


def read_tensors(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a folder, each in one piece, on the CPU, by name without the first part (`model.`).

    Args:
        folder: `MODEL_FOLDER` or `OPTIMIZER_FOLDER` of a checkpoint without `shard_faults`.
    """
    known = {name: each for name, each in _metadata(folder).state_dict_metadata.items() if wanted(name)}
    tensors = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in known.items()
        if isinstance(each, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it warns that no other process reads
        dcp.load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items()}


@contextmanager
def merged(checkpoint: Path) -> Iterator[Path]:
    """A sharded checkpoint as an ordinary one without the optimizer, in a temporary folder beside it.

    Raises:
        UserError: the checkpoint is damaged, or there is no space.
    """
    if found := shard_faults(checkpoint):
        raise UserError(f"`{checkpoint}` is not a complete checkpoint: {', '.join(found)}. Use another one.")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{checkpoint.name}.merged-", dir=checkpoint.resolve().parent) as name:
            folder = Path(name)
            tensors = read_tensors(checkpoint / MODEL_FOLDER)
            save_file(tensors, folder / files.WEIGHTS_NAME, metadata={"format": "pt"})
            del tensors
            companions = {checkpoint / name for name in _COMPANIONS if (checkpoint / name).is_file()}
            for path in companions | {path for path in files.tokenizer_files(checkpoint) if path.is_file()}:
                files.check_inside(path)
                shutil.copyfile(path, folder / path.name)
            yield folder
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"`{checkpoint}` cannot be merged beside it: {one_line(error)}. Make room there, or copy it elsewhere."
        ) from error


def make_folders(checkpoint: Path) -> None:
    """Make the folders that shards are written to."""
    for name in (MODEL_FOLDER, OPTIMIZER_FOLDER):
        os.makedirs(checkpoint / name, exist_ok=True)  # as accelerate does later


def write_sums(checkpoint: Path, rank: int, gather: Callable[[Any], list[Any]]) -> None:
    """Write `shards.json`; every process reads the files that it has written, and needs no list of the others'.

    On a network drive the list may be older than the files.

    Args:
        gather: collects what each process passes to it, from all of them.
    """
    folders = [checkpoint / name for name in (MODEL_FOLDER, OPTIMIZER_FOLDER)]
    mine: list[Path] = []
    for folder in folders:
        written = (folder / f"__{rank}_{number}.distcp" for number in count())
        mine += takewhile(Path.exists, written)
    if rank == 0:
        mine += [folder / _METADATA for folder in folders]
    sums = {str(path.relative_to(checkpoint)): file_sum(path) for path in mine}
    everywhere = gather(sums)
    if rank == 0:
        merged_sums = dict(sorted((name, crc) for part in everywhere for name, crc in part.items()))
        files.write_json(checkpoint / SUMS_NAME, {"format_version": 1, "algorithm": "crc32", "files": merged_sums})


def _stamps(folder: Path) -> tuple[tuple[int, ...], ...]:
    stats = [path.stat() for path in sorted(folder.iterdir())]
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def _metadata(folder: Path) -> Metadata:
    with (folder / _METADATA).open("rb") as stream:
        data = stream.read(_LARGEST_METADATA)
    metadata = _MetadataReader(io.BytesIO(data)).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("not a description of tensors")
    return metadata


@lru_cache(maxsize=64)
def _fault(folder: Path, stamps: tuple[tuple[int, ...], ...]) -> str | None:
    """The first fault of a folder, or None: in the pickle, its files, the places of tensors, the groups' values."""
    try:
        for path in folder.iterdir():
            files.check_inside(path)
        metadata = _metadata(folder)
        _check_places(folder, metadata)
        _check_values(folder, metadata)
    except UserError as error:
        return str(error).rstrip(".")
    except Exception as error:  # a damaged pickle can make Python raise anything
        return f"{_METADATA} is damaged ({one_line(error)})"
    return None


def _check_places(folder: Path, metadata: Metadata) -> None:
    """Check that every piece of a tensor is in a file beside `.metadata`, and that the pieces make up the tensor."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    pieces: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        if not _FILE_NAME.fullmatch(place.relative_path):
            raise ValueError(f"{json.dumps(str(place.relative_path))} is not a file of a checkpoint")
        if place.relative_path not in sizes:
            raise ValueError(f"{place.relative_path} is missing")
        if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[place.relative_path]:
            raise ValueError(f"{place.relative_path} is truncated")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{place.relative_path} is transformed")
        pieces[index.fqn] = pieces.get(index.fqn, 0) + place.length
    for name, each in metadata.state_dict_metadata.items():
        if not isinstance(each, TensorStorageMetadata):
            continue
        held = sum(math.prod(chunk.sizes) for chunk in each.chunks)
        if held != math.prod(each.size) or held * each.properties.dtype.itemsize > pieces.get(name, 0):
            raise ValueError(f"{name} is incomplete")


def _check_values(folder: Path, metadata: Metadata) -> None:
    """Check that all values except tensors are plain; torch would not check this when it loads them."""
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            continue
        with (folder / place.relative_path).open("rb") as stream:
            stream.seek(place.offset)
            torch.load(io.BytesIO(stream.read(place.length)), map_location="cpu", weights_only=True)
