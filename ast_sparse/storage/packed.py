"""Quantized sources: which can be decoded while loading, what their files must hold, and errors for the others."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ast_sparse.errors import UserError, one_line, shown
from ast_sparse.storage import bitmask, fp8
from ast_sparse.storage.quantized import forget_quantization, method_name, nested_configs

_FP8_METHODS = ("fp8", "mxfp8")
_FP8_SCALES = ("weight_scale_inv", "scale", "qscale_weight")  # names of the scales of `X.weight`
_FLOAT8, _EXPONENTS = ("F8_", "F4"), "F8_E8M0"  # dtypes as safetensors spells them; the latter are scales
_PACKAGES = {"compressed-tensors": "compressed-tensors", "bitsandbytes": "bitsandbytes"}
_CODES = re.compile(r"scale|qscale|zero_point|qzeros|qweight|g_idx|absmax|quant_map|quant_state|SCB|W_q|_packed|_meta$")
_CERTAIN_CODES = ("qweight", "qzeros", "weight_packed", "weight_scale_inv", "weight_scale")


def decode_on_load(config: PreTrainedConfig, name: str) -> None:
    """Make `from_pretrained` with this configuration decode the weights, whatever quantized them.

    Args:
        config: changed in place; one without `quantization_config` stays as it is.
        name: of the model, for messages.

    Raises:
        UserError: the method is unknown, has no decoder, or needs a package that is missing.
    """
    settings = next((found for each in nested_configs(config) if (found := _settings(each, name)) is not None), None)
    if settings is None:
        return
    forget_quantization(config)
    method = method_name(settings.get("quant_method"))
    if method == "compressed-tensors" and (sparse := bitmask.sparse_settings(settings, name)) is not None:
        if sparse:
            config.quantization_config = sparse
        return
    if method in _FP8_METHODS:
        settings["quant_method"] = fp8.METHOD
    key = settings["quant_method"]
    if method == "None" and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        key = "bitsandbytes_4bit" if settings.get("load_in_4bit") else "bitsandbytes_8bit"
    if key not in auto.AUTO_QUANTIZER_MAPPING:
        raise UserError(
            f"`{name}` is quantized by {shown(method)}, which transformers does not know, so it would take the codes "
            "for weights. Give the model that is not quantized."
        )
    quantizer: Any = auto.AUTO_QUANTIZER_MAPPING[key]
    if "dequantize" in inspect.signature(auto.AUTO_QUANTIZATION_CONFIG_MAPPING[key]).parameters:
        settings["dequantize"] = True
    elif quantizer._dequantize is HfQuantizer._dequantize:
        raise UserError(
            f"`{name}` is quantized by {method}, and transformers cannot decode that to plain weights. "
            "Give the model that is not quantized."
        )
    _check_environment(settings, method, name)
    config.quantization_config = settings


def _settings(config: Any, name: str) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config, "compression_config", None)  # of older models of compressed-tensors
        if isinstance(found, dict):
            return {"quant_method": "compressed-tensors", **found}
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict() if hasattr(found, "to_dict") else found
    if not isinstance(found, dict) or not ({"quant_method", "load_in_8bit", "load_in_4bit"} & found.keys()):
        raise UserError(
            f"`{name}`: quantization_config={shown(found)} in config.json names no `quant_method`. Restore the file."
        )
    return {"quant_method": None, **found}


def _check_environment(settings: dict[str, Any], method: str, name: str) -> None:
    """Raise UserError if the decoder cannot run here, before weights are read."""
    try:
        auto.AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).validate_environment(device_map=None)
    except UserError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(method)
        reason = one_line(error, end="open")
        fix = f"Install it: pip install {package}." if package else f"({reason}) Install the package."
        raise UserError(
            f"`{name}` is quantized by {method}, and the package that decodes it is not installed. {fix}"
        ) from error
    except Exception as error:  # a damaged quantization_config can make a quantizer raise anything
        raise UserError(
            f"`{name}` is quantized by {method}, and cannot be decoded here: {one_line(error, end='open')}. "
            "Check `quantization_config` in its config.json, or give the model that is not quantized."
        ) from error


def check_codes(
    stored: Mapping[str, tuple[str, list[int]]], config: PreTrainedConfig, model: nn.Module, name: str
) -> None:
    """Raise UserError if the files hold codes that loading would take for weights.

    Args:
        stored: dtype and shape by the name of every tensor.
        config: after `decode_on_load`.
        model: on the meta device.
        name: of the model, for messages.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        _check_plain(stored, model, name)
    elif settings["quant_method"] == fp8.METHOD:
        for key, (dtype, _) in stored.items():
            owner, _, last = key.rpartition(".")
            scaled = last == "weight" and any(f"{owner}.{scale}" in stored for scale in _FP8_SCALES)
            if _is_float8(dtype) and not scaled:
                raise UserError(
                    f"`{name}`: the tensor `{key}` is stored as {dtype} without a scale that transformers reads "
                    f"(`{owner}.{_FP8_SCALES[0]}`), so it cannot be decoded. Give the model that is not quantized."
                )


def _is_float8(dtype: str) -> bool:
    return dtype.startswith(_FLOAT8) and dtype != _EXPONENTS


def _check_plain(stored: Mapping[str, tuple[str, list[int]]], model: nn.Module, name: str) -> None:
    for key, (dtype, _) in stored.items():
        if _is_float8(dtype):
            raise UserError(
                f"`{name}`: the tensor `{key}` is stored as {dtype}, and config.json has no `quantization_config` that "
                "says how to decode it. Restore config.json, or give the model that is not quantized."
            )
    check_leftovers(stored, model, name)


def check_leftovers(stored: Iterable[str], model: nn.Module, name: str) -> None:
    """Raise UserError if a quantizer stored one of these tensors for a layer that is plain in the model.

    Parts of the checkpoint that the model lacks (an image encoder) are ignored.
    """
    is_read = _reader(model)
    modules = {key for key, _ in model.named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for key in stored:
        owner, _, last = key.rpartition(".")
        if _CODES.search(last) is None or is_read(key):
            continue
        beside = is_read(owner) or is_read(f"{owner}.weight")
        if (
            last in _CERTAIN_CODES
            or beside
            or (owner and {owner, prefix + owner, owner.removeprefix(prefix)} & modules)
        ):
            raise UserError(
                f"`{name}` holds `{key}` as a quantized model does, and config.json has no `quantization_config` that "
                "says how to decode it. Restore config.json, or give the model that is not quantized."
            )


def _reader(model: nn.Module) -> Callable[[str], bool]:
    """A function that says whether loading reads a stored tensor into the model, maybe under another name."""
    state, rename = model.state_dict(), _renamer(model)
    return lambda key: key in state or rename(key)[0] in state


def _renamer(model: nn.Module) -> Callable[[str], tuple[str, str | None]]:
    """A function that gives the name of a stored tensor in the model, and the pattern of a conversion it goes into."""
    state: Any = model.state_dict()
    conversions = get_model_conversion_mapping(cast(PreTrainedModel, model))
    renamings: Any = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters: Any = [each for each in conversions if isinstance(each, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", "") or None
    return lambda key: rename_source_key(key, renamings, converters, prefix, state)


def plain_names(stored: Iterable[str], model: nn.Module) -> dict[str, str] | None:
    """The names in the model of stored tensors that loading takes as they are, `{stored: name}`.

    Returns:
        None if loading would rename, join or split one, or if two have the same name in the model. Only the prefix of
        the base model may be missing, or be one too many.
    """
    state, rename = model.state_dict(), _renamer(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names: dict[str, str] = {}
    for key in stored:
        name, pattern = rename(key)
        if name not in state and pattern is None:
            continue
        if pattern is not None or name.removeprefix(prefix) != key.removeprefix(prefix) or name in names.values():
            return None
        names[key] = name
    return names


def moves_only(model: nn.Module) -> bool:
    """Whether the conversions that loading makes only move values, so that they can be made in any dtype."""
    conversions: Any = get_model_conversion_mapping(cast(PreTrainedModel, model))
    operations = [each for conversion in conversions for each in getattr(conversion, "operations", ())]
    return all(type(each).__module__ == WeightConverter.__module__ for each in operations)
