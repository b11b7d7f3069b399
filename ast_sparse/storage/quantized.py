"""Models whose weights were stored as codes: decode them, and forget how they were stored.

transformers remembers what it did while loading (`_weight_conversions`) and undoes it while saving. So it would write a
decoded model as codes again, although training has changed the weights and config.json calls them plain.
"""

from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ast_sparse.errors import UserError
from ast_sparse.storage.dtypes import loaded_dtypes


def make_plain(model: Any, name: str) -> None:
    """Decode what is still quantized and drop all traces of it, in place; a plain model stays as it is.

    Args:
        model: a `PreTrainedModel`; anything else stays as it is.
        name: of the model, for messages.

    Raises:
        UserError: transformers cannot decode this kind of quantization.
    """
    if not isinstance(model, PreTrainedModel):
        return
    named = model.config.dtype or torch.float32  # a name if the model has been saved
    own = named if isinstance(named, torch.dtype) else getattr(torch, named)
    was_quantized = getattr(model, "hf_quantizer", None) is not None
    if was_quantized:
        _decode(model, name, own)
    conversions = plain_conversions(model)
    if conversions is not getattr(model, "_weight_conversions", None):
        cast(Any, model)._weight_conversions = conversions
        was_quantized = True
    if was_quantized:
        _cast(model, own)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            forget_quantization(module.config)


def _decode(model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    quantizer: Any = model.hf_quantizer
    if getattr(quantizer.quantization_config, "dequantize", False):  # it was decoded while loading
        quantizer.remove_quantization_config(model)
        return
    method = method_name(quantizer.quantization_config.quant_method)
    try:
        model.dequantize(dtype=dtype)
    except NotImplementedError as error:
        raise UserError(
            f"{name!r} is quantized by {method}, and transformers cannot decode that. Load the model that is not "
            "quantized."
        ) from error
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give every tensor the dtype of a plain model: what was not quantized was read in the dtype it is stored in."""
    dtypes = loaded_dtypes(model, dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in dtypes and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name])


def method_name(method: Any) -> str:
    """The name of a quantization method as config.json spells it."""
    return str(getattr(method, "value", method))


def plain_conversions(model: Any) -> list[Any] | None:
    """What saving has to undo if the weights are plain: the conversions made while loading, except those that decode.

    A conversion that decodes and joins experts is replaced by one that only joins them.
    """
    used: list[Any] | None = getattr(model, "_weight_conversions", None)
    if not used or not any(_decodes(conversion) for conversion in used):
        return used
    plain = {_target(each): each for each in get_model_conversion_mapping(model) if hasattr(each, "operations")}
    kept = [plain.get(_target(each)) if _decodes(each) else each for each in used]
    return [each for each in kept if each is not None]


def _decodes(conversion: Any) -> bool:
    """Whether one of its operations belongs to a quantizer; those have a reference to it."""
    return any(getattr(each, "hf_quantizer", None) is not None for each in getattr(conversion, "operations", ()))


def _target(conversion: Any) -> tuple[Any, ...]:
    return (*conversion._original_target_patterns, conversion.scope_prefix)


def forget_quantization(config: Any) -> None:
    """Remove `quantization_config` from a configuration and from the configurations inside it.

    Older models of compressed-tensors call it `compression_config`, which some engines still read.
    """
    for each in nested_configs(config):
        for key in ("quantization_config", "compression_config"):
            if hasattr(each, key):
                delattr(each, key)
        if getattr(each, "_is_quantized", False):
            each._is_quantized = False


def nested_configs(config: Any) -> list[Any]:
    """A configuration and those inside it (`text_config`, `vision_config`), the outer one first."""
    inner = [getattr(config, key, None) for key in getattr(config, "sub_configs", None) or ()]
    return [config, *(each for one in inner if one is not None for each in nested_configs(one))]
