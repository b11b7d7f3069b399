"""Bytes of a model's weights, and how many of them the computation of one token reads.

At one token every weight is read once and used once, so no step can be faster than reading these bytes.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ast_sparse.evaluation.perplexity import text_config
from ast_sparse.export.formats import codec_of
from ast_sparse.storage import files
from ast_sparse.storage.locate import load_model_config
from ast_sparse.storage.quantized import forget_quantization
from ast_sparse.storage.slorb_adapter import read_adapter
from ast_sparse.storage.sparsity_record import has_adapter

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of which a token uses only some


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of all weights in memory, and of those that one token reads; None if that depends on the token."""

    total: int
    read: int | None


def is_compressed(folder: Path) -> bool:
    """Whether a model folder is an export in one of the compressed formats."""
    settings = files.read_json(folder / files.CONFIG_NAME).get("quantization_config")
    return isinstance(settings, dict) and codec_of(settings.get("quant_method")) is not None


def weight_bytes(folder: Path, dtype: torch.dtype, *, decoded: bool = False, adapter: bool = True) -> WeightBytes:
    """Bytes of the weights of a model folder loaded in a dtype; no weights are read, except those of an adapter.

    Tables of embeddings are not counted as read, unless they are the output head too, and neither is what is beside the
    decoder, such as an image encoder.

    Args:
        decoded: count the layers of a compressed export as dense.
        adapter: count the SLoRB adapter too, if there is one.
    """
    config: Any = load_model_config(folder)
    has_experts = any(getattr(text_config(config), name, None) for name in _EXPERTS)
    forget_quantization(config)
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    added = _slorb_entries(folder) * dtype.itemsize if adapter else 0
    if decoded or not is_compressed(folder):
        total = added + sum(each.numel() * each.element_size() for each in model.parameters())  # shared ones once
    else:
        total = added + sum(_stored(file, dtype) for file in files.weight_files(folder))
    return WeightBytes(total, None if has_experts else total - _unread(model))


def _unread(model: Any) -> int:
    """Bytes of what the computation of one token does not read, or reads one row of."""
    head = model.get_output_embeddings()
    own: set[Any] = set() if head is None else {*head.parameters()}
    tables = {each.weight for each in model.modules() if isinstance(each, nn.Embedding)}
    read = {*model.get_decoder().parameters()} - tables | own
    return sum(each.numel() * each.element_size() for each in model.parameters() if each not in read)


def _slorb_entries(folder: Path) -> int:
    """Entries of the SLoRB pairs of a model: in its weights if it is a checkpoint of a run, else in its adapter."""
    shapes = _shapes(folder)
    if adapted := files.sparse_keys(shapes)[1]:
        return sum(math.prod(shapes[f"{layer}.slorb.{part}"]) for layer in adapted for part in "SX")
    if not has_adapter(folder):
        return 0
    return sum(part.numel() for pair in read_adapter(folder / files.ADAPTER_FOLDER).values() for part in pair)


def has_masks(folder: Path) -> bool:
    """Whether a model folder is a checkpoint of a run, which holds masks beside its weights."""
    return bool(files.sparse_keys(_shapes(folder))[0])


def _shapes(folder: Path) -> dict[str, list[int]]:
    headers = [files.tensor_shapes(file) for file in files.weight_files(folder)]
    return {name: shape for header in headers for name, (_, shape) in header.items()}


def _stored(file: Path, dtype: torch.dtype) -> int:
    """Bytes of the tensors of a file if floating-point ones are loaded in `dtype`."""
    return sum(
        files.stored_bytes(f"F{8 * dtype.itemsize}" if kind in ("F64", "F32", "F16", "BF16") else kind, shape)
        for kind, shape in files.tensor_shapes(file).values()
    )


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size and time of the last change (ns) of a model's files, which tell whether they are still the same."""
    stats = {path.name: path.stat() for path in [folder / files.CONFIG_NAME, *files.weight_files(folder)]}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
