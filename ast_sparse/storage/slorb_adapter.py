"""SLoRB as a PEFT LoRA adapter beside the sparse model: `y = W̃x + S(Xx)` (paper Sec. 3.4)."""

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import _CACHED_NO_EXIST, constants, try_to_load_from_cache
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, logging

from ast_sparse.errors import UserError, one_line, shown
from ast_sparse.storage.checksums import CHECKSUMS_NAME, check_checksums, write_checksums
from ast_sparse.storage.files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_FOLDER,
    SPARSITY_CONFIG_NAME,
    SlorbPairs,
    check_inside,
    read_json,
    read_tensors,
    tensor_shapes,
    write_json,
)
from ast_sparse.storage.locate import Place, named_errors
from ast_sparse.storage.sparsity_record import has_adapter

logger = logging.get_logger(__name__)

_PREFIX = "base_model.model."
_WEIGHTS_NAME = "adapter_model.safetensors"


def common_group_dim(model: nn.Module, layers: Iterable[str]) -> int:
    """`group_dim` of the named layers: 0 if any of them is GPT-2's `Conv1D`, else 1."""
    return 0 if any(isinstance(model.get_submodule(name), Conv1D) for name in layers) else 1


def adapter_config(pairs: SlorbPairs, base_model: str, group_dim: int = 1) -> dict[str, Any]:
    """The LoRA configuration of some SLoRB pairs: scale 1, and for each layer the rank in_features / k.

    Args:
        pairs: S `[out, in/k]` and X `[in/k, in]` by layer name; the ranks may differ.
        base_model: path or hub id of the sparse model the adapter belongs to.
        group_dim: of the layers.
    """
    ranks = {name: x.shape[0] for name, (_, x) in pairs.items()}
    rank = max(ranks.values())
    # PEFT reads the keys of a pattern as regular expressions. Alpha equals the rank, so that the scale is 1.
    pattern = {re.escape(name): own for name, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": group_dim == 0,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _adapter_tensors(pairs: SlorbPairs, prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for name, (s, x) in pairs.items():
        # copies: layers that share one weight share their pair, and no file holds one tensor under two names
        tensors[f"{prefix}{name}.lora_A.weight"] = x.detach().clone(memory_format=torch.contiguous_format)
        tensors[f"{prefix}{name}.lora_B.weight"] = s.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def write_adapter(out_dir: Path, base_model: str, pairs: SlorbPairs, group_dim: int = 1) -> None:
    """Write SLoRB pairs as a PEFT adapter: `lora_A = X`, `lora_B = S`.

    Args:
        out_dir: folder of the adapter, created. Not the folder of the model itself: there `from_pretrained` would
            take the adapter for the model.
        base_model, pairs, group_dim: as in `adapter_config`; the dtype of the pairs is kept.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(_adapter_tensors(pairs, _PREFIX), out_dir / _WEIGHTS_NAME, metadata={"format": "pt"})
    write_checksums(out_dir, [out_dir / _WEIGHTS_NAME])
    write_json(out_dir / ADAPTER_CONFIG_NAME, adapter_config(pairs, base_model, group_dim))


def adapter_home(place: Place, revision: str | None) -> Path | None:
    """The folder beside whose weights a model has a SLoRB adapter; None if it has none, or has it turned off.

    Of a model on the hub it is a folder of the cache, into which the settings are downloaded, but not the pairs. What
    is not there while the hub cannot be reached counts as missing.

    Args:
        revision: on the hub; a commit, if it is known.

    Raises:
        UserError: as in `has_adapter`.
    """
    if place.gguf_file is not None:
        return None
    if place.folder is not None:
        return place.folder if has_adapter(place.folder) else None
    record = _from_hub(place, SPARSITY_CONFIG_NAME, revision)
    if record is None:
        return None
    _from_hub(place, f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG_NAME}", revision)
    return record.parent if has_adapter(record.parent, place.name) else None


def stored_adapter(place: Place, revision: str | None) -> SlorbPairs:
    """The SLoRB pairs of the adapter of a model, by layer name, downloaded if need be; empty if it has none.

    Args:
        revision: as in `adapter_home`.

    Raises:
        UserError: as in `adapter_home` and `read_adapter`; or the pairs cannot be downloaded.
    """
    home = adapter_home(place, revision)
    if home is None:
        return {}
    if place.folder is None:
        _from_hub(place, f"{ADAPTER_FOLDER}/{_WEIGHTS_NAME}", revision, is_needed=True)
        _from_hub(place, f"{ADAPTER_FOLDER}/{CHECKSUMS_NAME}", revision)
    return read_adapter(home / ADAPTER_FOLDER)


def _from_hub(place: Place, name: str, revision: str | None, is_needed: bool = False) -> Path | None:
    """A file of a model on the hub, downloaded unless the cache has it; None if it cannot be had and is not needed."""
    cases = ("missing_entries", "gated_repo", "connection_errors")
    raised = {f"_raise_exceptions_for_{case}": is_needed for case in cases}
    with named_errors("SLoRB adapter", place):
        found = cached_file(place.name, name, revision=revision, **raised)
    if found is not None:
        return Path(found)
    is_known = try_to_load_from_cache(place.name, name, revision=revision) is _CACHED_NO_EXIST
    if not is_known and not constants.HF_HUB_OFFLINE:  # a request failed: the hub did not say that there is none
        logger.warning(
            f"`{place.name}`: the hub was asked for {name} without success. If the model has SLoRB, it is not used: "
            "try again later."
        )
    return None


def read_adapter(folder: Path) -> SlorbPairs:
    """The SLoRB pairs of an adapter folder, by layer name.

    Raises:
        UserError: a file is missing or damaged, a scale is not 1, or the tensors are not pairs.
    """
    config = read_json(folder / ADAPTER_CONFIG_NAME)
    same_rank = config.get("r") == config.get("lora_alpha")
    if not same_rank or config.get("rank_pattern") != config.get("alpha_pattern") or config.get("use_rslora"):
        raise UserError(
            f"`{folder}` is not a SLoRB adapter: the scale alpha / r is not 1. Remove the folder to load without it."
        )
    weights = folder / _WEIGHTS_NAME
    check_inside(weights)
    tensor_shapes(weights)
    tensors = read_tensors([weights], lambda name: True)
    check_checksums(folder, [weights])
    names = {name.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name}
    try:
        keys = {name: f"{_PREFIX}{name}.lora_" for name in sorted(names)}
        pairs = {name: (tensors[f"{key}B.weight"], tensors[f"{key}A.weight"]) for name, key in keys.items()}
    except KeyError as error:
        raise UserError(f"`{folder / _WEIGHTS_NAME}` lacks the tensor {error}. Write the adapter again.") from error
    if not pairs or len(tensors) != 2 * len(pairs):
        raise UserError(f"`{folder / _WEIGHTS_NAME}` holds no SLoRB pairs. Write the adapter again.")
    return pairs


def read_pair(folder: Path, layer: str) -> tuple[Tensor, Tensor]:
    """S and X of one layer of an adapter that `read_adapter` has read."""
    wanted = [f"{_PREFIX}{layer}.lora_{part}.weight" for part in "BA"]
    tensors = read_tensors([folder / _WEIGHTS_NAME], lambda name: name in wanted)
    return tensors[wanted[0]], tensors[wanted[1]]


def with_twins(model: nn.Module, pairs: SlorbPairs) -> SlorbPairs:
    """The pairs, and those of layers that share another layer's weight: a checkpoint holds such a pair once."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    same = {key.removesuffix(".weight"): of.removesuffix(".weight") for key, of in ties.items()}
    return pairs | {name: pairs[of] for name, of in same.items() if of in pairs and name not in pairs}


def check_pairs(model: nn.Module, pairs: SlorbPairs, name: str) -> None:
    """Raise UserError unless every SLoRB pair fits a linear layer of the model.

    Args:
        name: of the checkpoint, for messages.
    """
    layers = dict(model.named_modules())
    for layer, (s, x) in pairs.items():
        weight = getattr(layers.get(layer), "weight", None)
        if weight is None:
            raise UserError(f"`{name}` has SLoRB for {shown(layer)}, which the model lacks. Write the adapter again.")
        shape = tuple(weight.shape[::-1]) if isinstance(layers[layer], Conv1D) else tuple(weight.shape)
        fits = s.dim() == x.dim() == 2 and s.shape[1] == x.shape[0] and (s.shape[0], x.shape[1]) == shape
        if not fits or not s.is_floating_point() or not x.is_floating_point():
            raise UserError(
                f"`{name}`: the SLoRB pair of `{layer}` is {s.dtype} {tuple(s.shape)} and {x.dtype} {tuple(x.shape)}, "
                f"which does not fit a layer of shape {shape}. Write the adapter again."
            )


def attach_adapter(model: PreTrainedModel, pairs: SlorbPairs, base_model: str) -> None:
    """Add SLoRB pairs to a model with sparse weights, in place and frozen, through PEFT.

    Raises:
        UserError: PEFT is not installed or does not load a pair, or a pair does not fit its layer.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"`{base_model}` has a SLoRB adapter, which PEFT loads. Install it: pip install 'ast-sparse[slorb]'."
        )
    from peft import LoraConfig

    check_pairs(model, pairs, base_model)
    config = LoraConfig(**adapter_config(pairs, base_model, common_group_dim(model, pairs)))
    tensors = {name: value.to(model.dtype) for name, value in _adapter_tensors(pairs, "").items()}
    try:  # the annotation says dict, but PEFT uses a config object
        model.load_adapter(peft_config=cast(Any, config), adapter_state_dict=tensors)
    except ValueError as error:  # PEFT refuses layers that its adapters do not support
        reason = one_line(error, end="open")
        raise UserError(f"The SLoRB adapter of `{base_model}` cannot be loaded: {reason}. Train without it.") from error
    loaded = model.state_dict()
    for name, value in tensors.items():  # PEFT only warns about what it does not place
        found = loaded.get(f"{name.removesuffix('.weight')}.default.weight")
        if found is None or not torch.equal(found.cpu(), value.cpu()):
            layer = name.rpartition(".lora_")[0]
            raise UserError(
                f"The SLoRB adapter of `{base_model}` cannot be loaded: PEFT does not load the pair of `{layer}`. "
                "Exclude the layer with `sparsity.exclude`, or train without SLoRB."
            )
