"""Load a causal LM from wherever it is: hub, local folder, training checkpoint, export or `.gguf` file."""

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ast_sparse.errors import UserError
from ast_sparse.storage import files
from ast_sparse.storage.checksums import check_checksums
from ast_sparse.storage.finite import check_finite
from ast_sparse.storage.locate import Place, load_model_config, named_errors, quiet_transformers
from ast_sparse.storage.origin import hub_commit, read_generation_config, source_folder
from ast_sparse.storage.packed import check_codes, check_leftovers, decode_on_load
from ast_sparse.storage.quantized import forget_quantization, make_plain
from ast_sparse.storage.sharded import is_sharded_checkpoint, merged
from ast_sparse.storage.slorb_adapter import attach_adapter, check_pairs, stored_adapter, with_twins

logger = logging.getLogger(__name__)

_SMALL = 10**6  # parameters of a model too small to exhaust the memory
_LARGEST_BUFFERS = 10**8  # entries that a model computes and no file holds: rotary tables, causal masks
_NOT_FLOATS = ("I", "U", "BOOL")  # safetensors' names of integers and bools


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, and what a plain model has no place for.

    Attributes:
        model: plain model; its weights are masked if the checkpoint holds masks.
        masks: bool, True = kept, by layer name, in the layout of the weight; empty unless it is a training checkpoint.
        slorb: SLoRB pairs S `[out, in/k]`, X `[in/k, in]` by layer name, in their stored dtype; not in the model.
    """

    model: PreTrainedModel
    masks: dict[str, Tensor]
    slorb: files.SlorbPairs


def load_causal_lm(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    revision: str | None = None,
    gguf_file: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a causal LM, ready to run, with masks applied and SLoRB attached if the checkpoint has them.

    Args:
        name_or_path: hub id, local folder (dense, one of our training checkpoints, or an export), or `.gguf` file.
        dtype: of the parameters; `auto` keeps the stored one.
        revision: branch, tag or commit on the hub.
        gguf_file: name of a .gguf file inside `name_or_path`; its weights are dequantized.
        attn_implementation: attention implementation of transformers.
        trust_remote_code: run code that comes with the model.
        config_overrides: values that replace those of config.json.

    Returns:
        A plain model on the CPU in evaluation mode. With SLoRB its layers are PEFT's, computing `W̃x + S(Xx)`.

    Raises:
        UserError: the model is missing, incomplete or damaged, or a package it needs is not installed.
    """
    checkpoint = load_checkpoint(
        name_or_path,
        dtype=dtype,
        revision=revision,
        gguf_file=gguf_file,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        config_overrides=config_overrides,
    )
    if checkpoint.slorb:
        attach_adapter(checkpoint.model, checkpoint.slorb, str(name_or_path))
    return checkpoint.model


def random_causal_lm(
    name_or_path: str | Path,
    seed: int,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A float32 model with the configuration of `name_or_path` and random weights; no weights are read.

    Args:
        seed: of the weights; the global random state is not changed.

    Other arguments and errors as in `load_model_config`.
    """
    config = load_model_config(
        name_or_path,
        revision=revision,
        gguf_file=gguf_file,
        trust_remote_code=trust_remote_code,
        config_overrides=config_overrides,
    )
    forget_quantization(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    take_generation_config(model)
    return cast(PreTrainedModel, model.eval())


def load_checkpoint(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    revision: str | None = None,
    gguf_file: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Load the parts of a model: plain model, masks, SLoRB pairs. Arguments and errors as in `load_causal_lm`."""
    place = Place.find(name_or_path, gguf_file)
    folder = place.model_folder
    if folder and is_sharded_checkpoint(folder):
        with merged(folder) as plain:
            return load_checkpoint(
                plain,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                config_overrides=config_overrides,
            )
    masks, slorb = _stored_sparsity(folder) if folder else ({}, {})
    config = load_model_config(
        name_or_path,
        revision=revision,
        gguf_file=gguf_file,
        trust_remote_code=trust_remote_code,
        config_overrides=config_overrides,
    )
    decode_on_load(config, place.name)
    arguments = place.arguments(revision, trust_remote_code)
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if place.gguf_file is not None:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    else:
        arguments["use_safetensors"] = True
    model = _load_weights(place, config, dtype, set(masks), arguments)
    _apply_stored_masks(model, masks, place.name)
    slorb = with_twins(model, slorb or stored_adapter(place, hub_commit(config) or revision))
    check_pairs(model, slorb, place.name)
    return Checkpoint(model, masks, slorb)


def _stored_sparsity(folder: Path) -> tuple[dict[str, Tensor], files.SlorbPairs]:
    """Masks and SLoRB pairs of a folder, whose checksums are checked first."""
    weights = files.weight_files(folder)
    check_checksums(folder, weights)
    return files.stored_sparsity(weights)


def _load_weights(
    place: Place,
    config: PreTrainedConfig,
    dtype: torch.dtype | Literal["auto"],
    masked: set[str],
    arguments: dict[str, Any],
) -> PreTrainedModel:
    if place.model_folder is not None:
        check_files(place.model_folder, place, config, arguments)
    # transformers would report every mask as an unexpected key: the keys are checked here instead.
    with named_errors("model", place), quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place.name, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    unused = sorted(key for key in info["unexpected_keys"] if not files.is_sparse_key(key, masked))
    if unused and place.folder is None and files.sparse_keys([*unused, *model.state_dict()])[0]:
        of = f" --revision {arguments['revision']}" if arguments.get("revision") is not None else ""
        raise UserError(
            f"`{place.name}` is a checkpoint of a run, whose masks are read from a folder only. Download it, and give "
            f"the folder: hf download {place.name}{of} --local-dir FOLDER"
        )
    if unused and place.folder is None and getattr(config, "quantization_config", None) is None:
        check_leftovers(unused, model, place.name)  # the files of a local folder are checked above
    warn_unused(unused, place.name)
    for name, stored, expected in sorted(info["mismatched_keys"], key=str):
        raise UserError(
            f"`{place.name}`: the tensor `{name}` has shape {tuple(stored)}, the model needs {tuple(expected)}. "
            "The weights do not belong to this config.json."
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"`{place.name}` lacks {len(missing)} tensors of {type(model).__name__}, the first is `{missing[0]}`. "
            "The checkpoint is incomplete, or was saved without its language-model head."
        )
    if place.gguf_file is not None:
        take_generation_config(model)
    make_plain(model, place.name)
    check_finite(model, repr(place.name))
    return model


def warn_unused(names: list[str], place: str) -> None:
    """Say that tensors of a checkpoint are not used."""
    if names:
        logger.warning("%s: %d tensors of the checkpoint are not used, e.g. %s", place, len(names), names[0])


def take_generation_config(model: Any) -> None:
    """Give a model the generation_config.json of its source, which transformers reads only beside safetensors."""
    folder = source_folder(model.config)
    generation = None if folder is None else read_generation_config(folder)
    if generation is not None and model.can_generate():
        model.generation_config = generation


def check_files(folder: Path, place: Place, config: PreTrainedConfig, arguments: dict[str, Any]) -> None:
    """Raise UserError if the files do not match config.json: transformers would allocate or cast what differs."""
    own = {"trust_remote_code": arguments["trust_remote_code"]}
    with named_errors("model", place), torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, **own)
    parameters = dict(model.named_parameters())
    needed = sum(parameter.numel() for parameter in parameters.values())
    buffers = sum(buffer.numel() for buffer in model.buffers())
    stored = {name: value for file in files.weight_files(folder) for name, value in files.tensor_shapes(file).items()}
    packed = getattr(config, "quantization_config", None) is not None
    check_codes(stored, config, model, place.name)
    held = sum(files.stored_bytes(*value) * 16 if packed else math.prod(value[1]) for value in stored.values())
    if needed > 2 * held + _SMALL or buffers > held + _LARGEST_BUFFERS:
        raise UserError(
            f"`{folder / files.CONFIG_NAME}` describes a model of {needed:,} parameters ({buffers:,} buffer entries), "
            f"but the files hold {held:,}. The weights do not belong to this config.json."
        )
    for name in [] if packed else parameters.keys() & stored.keys():
        if parameters[name].is_floating_point() and stored[name][0].startswith(_NOT_FLOATS):
            raise UserError(
                f"`{place.name}`: the tensor `{name}` holds {stored[name][0]}, the model needs floating-point "
                "numbers. Write the checkpoint again."
            )


@torch.no_grad()
def _apply_stored_masks(model: PreTrainedModel, masks: dict[str, Tensor], name: str) -> None:
    for layer, mask in masks.items():
        try:
            weight = model.get_parameter(f"{layer}.weight")
        except AttributeError as error:
            raise UserError(f"`{name}` has a mask for `{layer}`, which the model lacks. Write it again.") from error
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise UserError(
                f"`{name}`: the mask of `{layer}` is {mask.dtype} {tuple(mask.shape)}, its weight "
                f"{tuple(weight.shape)}. Write the checkpoint again."
            )
        if bool((mask.view(torch.uint8) > 1).any()):
            raise UserError(
                f"`{name}`: the mask of `{layer}` has values other than 0 and 1. Write the checkpoint again."
            )
        weight.copy_(torch.where(mask, weight, 0))
