"""Sparse checkpoints of compressed-tensors, decoded while loading; the library itself dropped them after 0.14.

A layer X is stored as `X.compressed`, its kept values row by row, `X.bitmask`, uint8 `[..., ceil(columns / 8)]` with
one bit for each weight (the lowest bit is the first column), and `X.shape`, int64. In the format `sparse-24-bitmask`,
`compressed` is `[rows, columns / 2]`. In `sparse-bitmask` it is flat, and `X.row_offsets` says where each row begins in
it, which also follows from the bits. Version 0.5 stored every parameter that way, biases too, under its whole name:
`X.weight.compressed`.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ast_sparse.errors import UserError, shown

METHOD = "ast_sparse_bitmask"  # replaces `compressed-tensors` in memory, and is never written to a file

_FORMATS = ("sparse-24-bitmask", "sparse-bitmask")
_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_PART = re.compile("|".join(_PARTS))
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def decode_bitmask(compressed: Tensor, bitmask: Tensor, shape: Tensor, row_offsets: Tensor | None = None) -> Tensor:
    """The dense weight of a layer, exactly 0.0 where pruned, in the dtype of `compressed`.

    Args:
        compressed: kept values in the order of the weight, flat, or `[rows, columns / 2]` for 2 of every 4.
        bitmask: uint8, eight columns for each byte, lowest bit first.
        shape: of the weight, in any arrangement: `[2]` or `[2, 1]`.
        row_offsets: `[rows]`, where the values of each row begin; only compared with the bits.

    Raises:
        ValueError: the parts do not fit together.
    """
    sizes = [int(size) for size in shape.flatten()]
    if compressed.dtype not in _FLOATS:
        raise ValueError(f"its values are {compressed.dtype}, and only bfloat16, float16 and float32 are read")
    if not sizes or min(sizes) < 1 or bitmask.dtype != torch.uint8:
        raise ValueError(f"shape {sizes} and a bitmask of {bitmask.dtype} make no weight")
    if list(bitmask.shape) != [*sizes[:-1], math.ceil(sizes[-1] / 8)]:
        raise ValueError(f"a bitmask of {list(bitmask.shape)} does not fit shape {sizes}")
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    mask = (bitmask.unsqueeze(-1) & powers != 0).flatten(-2)
    if bool(mask[..., sizes[-1] :].any()):
        raise ValueError("its bitmask has bits behind the last column")
    mask = mask[..., : sizes[-1]]
    if int(mask.sum()) != compressed.numel():
        raise ValueError(f"its bitmask keeps {int(mask.sum()):,} weights, but {compressed.numel():,} values are stored")
    if compressed.dim() > 1 and (mask.numel() % 4 or bool((mask.reshape(-1, 4).sum(-1) != 2).any())):
        raise ValueError("its bitmask does not keep 2 of every 4 weights")
    counts = mask.sum(-1)
    if row_offsets is not None and len(sizes) == 2 and row_offsets.tolist() != (counts.cumsum(0) - counts).tolist():
        raise ValueError("its `row_offsets` do not fit its bitmask")
    dense = torch.zeros(sizes, dtype=compressed.dtype, device=compressed.device)
    dense[mask] = compressed.flatten()
    return dense


def sparse_settings(settings: dict[str, Any], name: str) -> dict[str, Any] | None:
    """What a `quantization_config` of compressed-tensors becomes if it describes zeros, and codes only for them.

    Args:
        name: of the model, for messages.

    Returns:
        The settings of `BitmaskQuantizer`; an empty dictionary if the weights are stored dense, so that nothing has to
        be decoded; None if they are quantized, which compressed-tensors itself decodes.

    Raises:
        UserError: they are quantized and sparse, or stored in a format that is not known.
    """
    section = settings.get("sparsity_config") or {}
    if not isinstance(section, dict):
        raise UserError(f"`{name}`: sparsity_config={shown(section)} is not a mapping. Restore config.json.")
    format, quantized = section.get("format", "dense"), bool(settings.get("config_groups"))
    if format == "dense":
        others = settings.get("kv_cache_scheme") or settings.get("transform_config")
        is_plain = not quantized and not others and settings.get("format", "dense") in ("dense", *_FORMATS)
        return {} if is_plain else None
    if format not in _FORMATS:
        raise UserError(
            f"`{name}` is stored in the sparse format {shown(format)}, which is not read. Give the dense model, or one "
            f"in {' or '.join(_FORMATS)}."
        )
    if quantized or settings.get("transform_config"):
        what = "quantized" if quantized else "transformed (`transform_config`)"
        raise UserError(
            f"`{name}` is {what} and stored as {format}, and only bfloat16, float16 and float32 are read in that "
            "format. Give the plain model."
        )
    return {"quant_method": METHOD, "dequantize": True}


class BitmaskConfig(QuantizationConfigMixin):
    """The `quantization_config` in memory; its weights are always decoded."""

    def __init__(self, dequantize: bool = True, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers reads it from the instance
        self.dequantize = dequantize


class _Decode(ConversionOps):
    """Load operation: the parts of a layer become its dense weight.

    transformers would wrap an error in a general one, so it is noted and raised after loading.
    """

    def __init__(self, hf_quantizer: "BitmaskQuantizer") -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Decode":
        return self  # all problems must go into one list

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: Any, **_: Any
    ) -> dict[str, Tensor]:
        found = {_PART.findall(key)[0]: each[0] if isinstance(each, list) else each for key, each in input_dict.items()}
        expected = model.get_parameter(full_layer_name)
        try:
            if missing := [part for part in _PARTS[:3] if part not in found]:
                raise ValueError(f"the checkpoint lacks its `{missing[0]}`")
            dense = decode_bitmask(*(found[part] for part in _PARTS if part in found))
            if dense.shape != expected.shape:
                raise ValueError(f"it decodes to {tuple(dense.shape)}, the model needs {tuple(expected.shape)}")
            return {full_layer_name: dense.to(expected.dtype)}
        except ValueError as error:
            self.hf_quantizer.problems.append(f"`{full_layer_name}`: {error}")
            return {full_layer_name: torch.zeros(expected.shape, dtype=expected.dtype)}


class BitmaskQuantizer(HfQuantizer):
    """Decodes the layers of a sparse checkpoint while it is loaded; experts that transformers joins are not decoded."""

    requires_calibration = True

    def __init__(self, quantization_config: BitmaskConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.problems: list[str] = []

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Append the decoding to the model's own conversions."""
        sources = {".weight": (r"(?<!\.weight)(?<!\.bias)", r"\.weight"), ".bias": (r"\.bias",)}
        added = [
            WeightConverter([rf"{before}\.{part}$" for part in _PARTS], target, [_Decode(self)])
            for target, befores in sources.items()
            for before in befores
        ]
        return [*weight_conversions, *added]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.problems:
            more = f" (and {len(self.problems) - 1} more layers)" if len(self.problems) > 1 else ""
            raise ValueError(f"The sparse checkpoint is damaged: {self.problems[0]}{more}. Copy it again.")
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(BitmaskConfig)
    auto.register_quantizer(METHOD)(BitmaskQuantizer)
