"""Check that a folder reads back as what was written."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ast_sparse.distributed.ranks import errors_shared, gather, own_rank
from ast_sparse.errors import UserError
from ast_sparse.kernels.code24 import same_bits
from ast_sparse.storage import files
from ast_sparse.storage.load import load_checkpoint
from ast_sparse.storage.locate import load_model_config
from ast_sparse.storage.save import split_state_dict
from ast_sparse.storage.save_pieces import plain_pieces, stored_pieces
from ast_sparse.storage.slorb_adapter import read_adapter
from ast_sparse.storage.sparsity_record import has_adapter


def check_saved(model: PreTrainedModel, folder: Path, trust_remote_code: bool = False) -> None:
    """Compare a trained model with the folder it was saved in, bit for bit.

    The files are read one tensor at a time, unless loading converts them: then the model is loaded a second time.

    Args:
        model: with sparse layers, in one piece.

    Raises:
        UserError: the folder cannot be read, or the model read back differs.
    """
    weights, _, pairs = split_state_dict(model.state_dict())
    try:
        if _is_read_by_name(model, weights, folder, trust_remote_code):
            tied = _tied(model, weights)
            wanted: Mapping[str, Tensor] = {name: weights[name] for name in weights if name not in tied}
            found = _stored(folder)
            read = read_adapter(folder / files.ADAPTER_FOLDER) if has_adapter(folder) else {}
        else:
            checkpoint = load_checkpoint(folder, dtype=model.dtype, trust_remote_code=trust_remote_code)
            wanted, found, read = weights, iter(checkpoint.model.state_dict().items()), checkpoint.slorb
    except UserError as error:
        raise _unlike(folder, str(error)) from error
    if (name := differing(found, wanted)) is not None:
        raise _unlike(folder, f"`{name}` differs.")
    if not same_pairs(read, pairs, None):
        raise _unlike(folder, "the SLoRB adapter differs.")


def check_saved_pieces(model: nn.Module, frame: PreTrainedModel, folder: Path, trust_remote_code: bool = False) -> bool:
    """As `check_saved`, for a model that FSDP2 has sharded; all processes must call this.

    The first process reads the files. It compares one weight at a time, which all processes gather.

    Args:
        frame: the model before it was sharded, without values.

    Returns:
        False, and nothing is compared, if loading converts the files: then gather the model.
    """
    pieces, pairs = plain_pieces(model)
    stored, is_first = stored_pieces(pieces, frame), own_rank()[0] == 0
    places: dict[str, Path] = {}
    adapter: files.SlorbPairs = {}
    with errors_shared():
        try:
            weights = {name: piece.meta() for name, piece in pieces.items()}
            if is_first and stored is not None and _is_read_by_name(frame, weights, folder, trust_remote_code):
                places = {name: file for file in files.weight_files(folder) for name in files.tensor_shapes(file)}
                adapter = read_adapter(folder / files.ADAPTER_FOLDER) if has_adapter(folder) else {}
        except UserError as error:
            raise _unlike(folder, str(error)) from error
    if stored is None or not gather(bool(places))[0]:
        return False
    fault = "the SLoRB adapter differs." if is_first and adapter.keys() != pairs.keys() else None
    for name, piece in stored.items():
        value = {name: piece.gathered()}  # by all, also after a fault
        if is_first and fault is None and differing(_stored_one(places[name], name), value) is not None:
            fault = f"`{name}` differs."
    for layer, pair in pairs.items():
        gathered = {layer: (pair[0].gathered(), pair[1].gathered())}
        if is_first and fault is None and not same_pairs({layer: adapter[layer]}, gathered, None):
            fault = "the SLoRB adapter differs."
    with errors_shared():
        if fault is not None:
            raise _unlike(folder, fault)
    return True


def _unlike(folder: Path, fault: str) -> UserError:
    return UserError(
        f"`{folder}` was written, but does not read back as the model that was trained: {fault} "
        "Export a checkpoint of the run with ast-export, and report this."
    )


def _is_read_by_name(
    model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, trust_remote_code: bool
) -> bool:
    """Whether loading takes every tensor of the files as it is, as the parameter of the same name."""
    config: Any = load_model_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None or type(config) is not type(model.config):
        return False
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        frame: PreTrainedModel = type(model)._from_config(copy.deepcopy(config), dtype=model.dtype)
    shapes = {name: value.shape for name, value in frame.state_dict().items()}
    stored = {name for file in files.weight_files(folder) for name in files.tensor_shapes(file)}
    conversions = get_model_conversion_mapping(frame)
    return (
        shapes == {name: value.shape for name, value in weights.items()}
        and stored == shapes.keys() - _tied(frame, shapes) == shapes.keys() - _tied(model, weights)
        and not any(each.compiled_sources.search(name) for each in conversions for name in stored)
    )


def _tied(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Names of tensors that are stored under another name."""
    names = set(names)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for name, kept in tied.items() if name in names and kept in names}


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in files.weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)


def _stored_one(file: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        yield name, tensors.get_tensor(name)


def differing(found: Iterable[tuple[str, Tensor]], wanted: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that is missing, added, or different in dtype or in a bit; None if there is none."""
    seen = set()
    for name, value in found:
        seen.add(name)
        if name not in wanted or value.dtype != wanted[name].dtype or not same_bits(value, wanted[name].cpu()):
            return name
    return min(wanted.keys() - seen, default=None)


def same_pairs(found: files.SlorbPairs, wanted: files.SlorbPairs, dtype: torch.dtype | None) -> bool:
    """Whether SLoRB pairs are equal; the wanted ones are cast to `dtype`, or not if it is None."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name][i], wanted[name][i].to("cpu", dtype or wanted[name][i].dtype))
        for name in found
        for i in range(2)
    )
