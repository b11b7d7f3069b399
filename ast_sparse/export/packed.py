"""Quantized sources: what can be decoded while loading, what the files must hold for that, and clear refusals."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from ast_sparse.errors import UserError
from ast_sparse.export import fp8
from ast_sparse.quantized import forget_quantization, method_name, nested_configs
from ast_sparse.yaml12 import shown

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
        mend = f"Install it: pip install {package}." if package else f"({_one_line(error)}) Install the package."
        raise UserError(
            f"`{name}` is quantized by {method}, and the package that decodes it is not installed. {mend}"
        ) from error
    except Exception as error:  # whatever a damaged quantization_config makes a quantizer raise
        raise UserError(
            f"`{name}` is quantized by {method}, and cannot be decoded here: {_one_line(error)}. "
            "Check `quantization_config` in its config.json, or give the model that is not quantized."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


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
    known = {key for key, _ in (*model.named_parameters(), *model.named_buffers())}
    last_names = {key.rpartition(".")[2] for key in known}
    modules = {key for key, _ in model.named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for key in stored:
        owner, _, last = key.rpartition(".")
        beside = owner in stored or f"{owner}.weight" in stored  # a subtree that the model lacks is not looked at
        is_ours = owner and (beside or {owner, prefix + owner, owner.removeprefix(prefix)} & modules)
        if not is_code(key) or last in last_names or not (is_ours or last in _CERTAIN_CODES):
            continue
        if _renamed(model, key).rpartition(".")[2] not in last_names:
            raise UserError(leftover(name, key))


def _renamed(model: nn.Module, key: str) -> str:
    """The name that loading gives a tensor: some families publish theirs under other names than their code has."""
    if not isinstance(model, PreTrainedModel):
        return key
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return apply_renamings(key, renamings)


def is_code(key: str) -> bool:
    """Whether a tensor is called like what a quantizer stores beside or instead of a weight."""
    return _CODES.search(key.rpartition(".")[2]) is not None


def leftover(name: str, key: str) -> str:
    """The message about a tensor that only a quantized model has."""
    return (
        f"`{name}` holds `{key}` as a quantized model does, and config.json has no `quantization_config` that says how "
        "to decode it. Restore config.json, or give the model that is not quantized."
    )
