"""Checkpoint folders on disk: their weight files, and the masks and SLoRB pairs stored in them."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ast_sparse.errors import UserError, shown

CONFIG_NAME = "config.json"
SPARSITY_CONFIG_NAME = "sparsity_config.json"
ADAPTER_FOLDER = "slorb"
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")  # one of these makes a tokenizer
COMPANION_FILES = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"

_LONGEST_NAME = 500
_LARGEST_JSON = 2**28  # bytes: many times the index of the largest models

SlorbPairs = dict[str, tuple[Tensor, Tensor]]  # S [out, in/k] and X [in/k, in] by layer name

_FILE_NAME = re.compile(r"[^/\\\s\0]+\.safetensors")
_MASK, _START_MASK, _SLORB_S, _SLORB_X = ".mask", ".start_mask", ".slorb.S", ".slorb.X"


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds.

    Raises:
        UserError: names the file, which is missing, a link out of its folder, too large, or not a JSON object.
    """
    check_inside(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST_JSON + 1)
        if len(data) > _LARGEST_JSON:
            raise UserError(f"Cannot read `{path}`: it is larger than 256 MiB. Restore the file.")
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"Cannot read `{path}`: nested too deeply. Restore the file.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read `{path}`: {error}. Restore the file.") from error
    if not isinstance(content, dict):
        raise UserError(f"Cannot read `{path}`: it is not a JSON object. Restore the file.")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{shown(name)} appears twice")
        content[name] = value
    return content


def is_same(first: Path, second: Path) -> bool:
    """Whether two paths name one folder or file, also by links and mounts; or the same one that does not exist."""
    try:
        return first.samefile(second)
    except OSError:
        return first.resolve() == second.resolve()


def check_inside(path: Path) -> None:
    """Raise UserError if a file is a link that leads out of its folder; the hub's cache may link to its own blobs."""
    if not path.is_symlink() or not path.exists():
        return
    home, target = path.parent.resolve(), path.resolve()
    blobs = [above.parent / "blobs" for above in home.parents if above.name == "snapshots"]
    if home not in target.parents and target.parent not in blobs:
        raise UserError(
            f"`{path}` is a link to `{target}`, outside its folder. Put the file there, or link the whole folder."
        )


def finite_or_none(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity: they become None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: dict[str, Any], *, durable: bool = False) -> None:
    """Write an object as indented JSON through a temporary file and a rename: a reader never sees half of it.

    Args:
        durable: flush the file to disk before the rename, so that a power cut does not damage it either.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_model_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is a folder with a readable config.json, and no adapter beside the model."""
    if not folder.is_dir():
        raise UserError(f"`{folder}` is not a folder. Give a folder that holds a model.")
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"`{folder}` holds no {CONFIG_NAME}, so it is not a model. Give a folder that holds a model.")
    config = read_json(folder / CONFIG_NAME)
    if "transformers_weights" in config:
        raise UserError(f"`{folder / CONFIG_NAME}` names other weights in `transformers_weights`. Remove the key.")
    if (folder / ADAPTER_CONFIG_NAME).is_file():  # from_pretrained would add it to the model, and rename the layers
        raise UserError(f"`{folder}` holds {ADAPTER_CONFIG_NAME} beside a model. Merge the adapter, or move it away.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of the index, each with an intact header.

    Raises:
        UserError: there are no safetensors weights; a file of the index is missing or outside the folder; two files
            hold the same tensor; or a file is truncated or not in the safetensors format.
    """
    if (folder / WEIGHTS_NAME).is_file():
        files = [folder / WEIGHTS_NAME]
    elif (folder / INDEX_NAME).is_file():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"`{folder / INDEX_NAME}` lists no weights. Restore the file.")
        files = _indexed_files(folder, weight_map)
    else:
        pickled = " It has only pickled weights, which are not read." if any(folder.glob("pytorch_model*.bin")) else ""
        raise UserError(f"`{folder}` holds no {WEIGHTS_NAME}.{pickled} Save the model with `save_pretrained` first.")
    held_by: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"`{folder / INDEX_NAME}` names `{file.name}`, which is missing. Restore the file.")
        check_inside(file)
        for name in tensor_shapes(file):
            if name in held_by:
                raise UserError(
                    f"`{file}` and `{held_by[name].name}` both hold {shown(name)}. Write the checkpoint again."
                )
            held_by[name] = file
    return files


def _indexed_files(folder: Path, weight_map: dict[str, Any]) -> list[Path]:
    """The files an index names, which must be safetensors files of the folder itself."""
    for name in weight_map.values():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise UserError(
                f"`{folder / INDEX_NAME}` names {shown(name)}, which is not a safetensors file beside it. Restore it."
            )
    return [folder / name for name in dict.fromkeys(weight_map.values())]


def tensor_shapes(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype (in safetensors' spelling) and shape of every tensor of a file, read from its header alone."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            if odd := next((name for name in slices if not name.isprintable() or len(name) > _LONGEST_NAME), None):
                raise ValueError(f"{shown(odd)} is not a tensor name")
            return {name: (piece.get_dtype(), piece.get_shape()) for name, piece in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> UserError:
    is_missing = isinstance(error, FileNotFoundError)
    reason = "cannot be read: No such file or directory" if is_missing else f"is damaged: {error}"
    return UserError(f"`{file}` {reason}. Copy or write the checkpoint again.")


_ITEM_BYTES = {"64": 8, "32": 4, "16": 2, "8": 1}


def stored_bytes(dtype: str, shape: list[int]) -> int:
    """Bytes of a tensor as `tensor_shapes` describes it."""
    itemsize = _ITEM_BYTES.get(dtype.lstrip("BFIU").split("_")[0], 1)  # BF16, F32, I64, U8, F8_E4M3, BOOL
    return itemsize * math.prod(shape)


def read_tensors(files: Iterable[Path], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of some safetensors files whose names are wanted."""
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found.update({name: tensors.get_tensor(name) for name in tensors.keys() if wanted(name)})  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise _unreadable(file, error) from error
    return found


def sparse_keys(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Layers of a raw state dict that carry a mask, and those that carry SLoRB.

    A buffer that another model calls `mask` is not taken for one of ours, which have `X.start_mask` beside them.
    """
    names = set(names)
    masked = {name.removesuffix(_MASK) for name in names if name.endswith(_MASK)}
    masked = {layer for layer in masked if {f"{layer}.weight", layer + _START_MASK} <= names}
    return masked, {layer for layer in masked if {layer + _SLORB_S, layer + _SLORB_X} <= names}


def is_sparse_key(name: str, masked: set[str]) -> bool:
    """Whether a key holds a mask or SLoRB of one of the masked layers rather than an ordinary weight."""
    suffixes = (_MASK, _START_MASK, _SLORB_S, _SLORB_X)
    return any(name.endswith(suffix) and name.removesuffix(suffix) in masked for suffix in suffixes)


def stored_sparsity(files: list[Path]) -> tuple[dict[str, Tensor], SlorbPairs]:
    """Masks and SLoRB pairs by layer name that a training checkpoint holds; both empty for any other model."""
    names = [name for file in files for name in tensor_shapes(file)]
    masked, adapted = sparse_keys(names)
    tensors = read_tensors(files, lambda name: is_sparse_key(name, masked) and not name.endswith(_START_MASK))
    masks = {layer: tensors[layer + _MASK] for layer in sorted(masked)}
    pairs = {layer: (tensors[layer + _SLORB_S], tensors[layer + _SLORB_X]) for layer in sorted(adapted)}
    return masks, pairs


def tokenizer_files(folder: Path) -> set[Path]:
    """The tokenizer files of a folder and the files that belong to them; empty if it has no tokenizer.

    Raises:
        UserError: one of them is a link to a file outside the folder.
    """
    found = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    companions = {path for pattern in COMPANION_FILES for path in folder.glob(pattern)}
    for path in found | companions:  # an export copies them, but no file from outside the folder
        for part in (path, *(path.rglob("*") if path.is_dir() else ())):
            check_inside(part)
    return found | companions if found else set()
