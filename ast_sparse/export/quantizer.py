"""The transformers plug-in that reads and writes compressed checkpoints of every codec in `formats`.

A pruned layer X is stored as `X.weight`, the kept values, and `X.weight_meta`, their positions: for 2:4, `[out, in/2]`
and `[out, in/8]`. Values of few bits have scales in `X.weight_scale`. The values keep the name `weight`, so that a
reader without the plug-in stops with a size mismatch instead of initialising the layer at random. By default the layers
are decoded while loading.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ast_sparse.distributed.pieces import local
from ast_sparse.errors import UserError, shown
from ast_sparse.export.codec import META, SCALE, Codec
from ast_sparse.export.codec24 import CODE24
from ast_sparse.export.compressed_names import lacking_parts, linears_of, renames, short_name, twins_of
from ast_sparse.export.formats import check_format, codec_of, codecs
from ast_sparse.export.peft_view import UndecodedWeight, asked_by_peft
from ast_sparse.kernels.cpu.pages import in_huge_pages
from ast_sparse.sparsity.reads import dtype_asked, read_past_forward
from ast_sparse.storage.checksums import check_checksums
from ast_sparse.storage.files import tensor_shapes


class AstSparse24Config(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint of any codec; it is named after the first one.

    Args:
        modules: names of the compressed layers.
        dequantize: decode the layers while loading; False keeps them compressed in memory.
        format_version: of the checkpoint; one newer than this reader's is an error.
        quant_method: the codec's `method`.

    To keep a checkpoint compressed, pass `quantization_config=AstSparse24Config(dequantize=False)` to
    `from_pretrained`; the codec and the module names come from the checkpoint.
    """

    def __init__(
        self,
        modules: list[str] | None = None,
        dequantize: bool = True,
        format_version: int = 1,
        quant_method: str = CODE24.method,
        **_: Any,  # every key of the JSON object arrives here
    ) -> None:
        check_format(quant_method, format_version, modules)
        if not isinstance(dequantize, bool):
            raise UserError(
                f"{quant_method}: dequantize={shown(dequantize)} is not true or false. Restore config.json."
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers reads it from the instance
        self.modules = list(modules or ())
        self.dequantize = dequantize
        self.format_version = format_version

    @classmethod
    def of(cls, codec: Codec, modules: list[str]) -> "AstSparse24Config":
        """The config of a checkpoint written by a codec."""
        return cls(modules, format_version=codec.format_version, quant_method=codec.method)

    @property
    def codec(self) -> Codec:
        """The codec that the layers are stored with."""
        codec = codec_of(self.quant_method)
        assert codec is not None, "checked when it was made"
        return codec

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained(quantization_config=…)` may change about a checkpoint."""
        return {"dequantize": self.dequantize}


class CompressedLinear(nn.Linear):
    """`y = x Wᵀ + b` with W stored as values and metadata; replaces `nn.Linear` and GPT-2's `Conv1D`.

    Attributes:
        codec: what W is stored with.
        weight: the kept values, not trained; for 2:4 `[out, in/2]`.
        weight_meta: their positions, uint8; for 2:4 `[out, in/8]`.
        weight_scale: the scales of values of few bits, in the dtype of the layer; None for other codecs.
        is_conv1d: whether it replaces a `Conv1D`.
    """

    weight_meta: Tensor
    weight_scale: Tensor | None
    is_conv1d = False

    def __init__(
        self, codec: Codec, in_features: int, out_features: int, bias: bool, device: Any, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.codec = codec
        self.in_features, self.out_features = in_features, out_features
        shapes, dtypes = codec.shapes(out_features, in_features), codec.dtypes(dtype)
        values, meta, *scale = (
            torch.empty(shape, device=device, dtype=each) for shape, each in zip(shapes, dtypes, strict=True)
        )
        self.weight = nn.Parameter(values, requires_grad=False)
        # transformers draws random values for what it offloads to disk, and has none for integers
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_buffer(META, meta)
        self.register_buffer(SCALE, scale[0] if scale else None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @property
    def base_layer(self) -> "CompressedLinear":
        """For PEFT, the layer below an adapter; for any other caller there is none."""
        if not asked_by_peft():
            raise AttributeError("base_layer")
        return _SeenByPeft(self)

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The stored tensors, as `codec.decode` takes them."""
        values = cast(Tensor, self._parameters["weight"])
        scale = self.weight_scale
        return (values, self.weight_meta) if scale is None else (values, self.weight_meta, scale)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the decoded weight."""
        return self.stored[0].dtype if self.weight_scale is None else self.weight_scale.dtype

    def dense_weight(self) -> Tensor:
        """The decoded weight `[out, in]`."""
        return self.codec.decode(*self.stored)

    def forward(self, input: Tensor) -> Tensor:
        values = cast(Tensor, self._parameters["weight"])
        return self.codec.linear(input, values, self.weight_meta, self.bias, self.weight_scale)


class _SeenByPeft(CompressedLinear):
    """A compressed layer whose weight looks like the decoded one, and decodes the layer when its values are needed.

    It shares the parameters of the layer, and may replace it in the model, as after PEFT's `unload()`.
    """

    base_layer = property()  # there is none below

    def __init__(self, layer: CompressedLinear) -> None:
        self.__dict__.update(layer.__dict__)
        self.__dict__["_layer"] = layer  # not through nn.Module, which would register it as a submodule

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter of the layer
        stored = cast(Tensor, self._parameters["weight"])
        layer = self.__dict__["_layer"]
        return UndecodedWeight.of(layer, stored, self.dtype) if META in self._buffers else stored

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.__dict__["_layer"](input))

    def __delattr__(self, name: str) -> None:
        if name == "weight":  # to be replaced by a parametrization, which the layer itself would not see
            raise UserError(
                "PEFT's target_parameters names the weight of a layer that is kept compressed. Load the model with "
                "`dequantize=True`, or name the layer in target_modules."
            )
        super().__delattr__(name)


class DecodeWeight(ConversionOps):
    """Load operation: values and metadata of a compressed layer become its dense weight.

    transformers calls it for every key that ends in `weight`, and would wrap our error in a general one. So a problem
    is noted, a placeholder is returned, and the quantizer raises once all weights are loaded.
    """

    def __init__(self, codec: Codec, modules: frozenset[str], problems: list[str]) -> None:
        self.codec = codec
        self.modules = modules
        self.problems = problems

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodeWeight":
        return self  # transformers copies the operation for each tensor, but all problems must go into one list

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, **_: Any
    ) -> dict[str, Tensor]:
        collected = {
            key.rstrip("$"): value[0] if isinstance(value, list) else value for key, value in input_dict.items()
        }
        weight, meta, scale = (collected.get(key) for key in ("weight", META, SCALE))
        name = full_layer_name.rpartition(".")[0]
        expected = local(model.get_parameter(full_layer_name))  # transformers has cut what is stored as it cut this
        try:
            if weight is None:
                raise ValueError("the checkpoint has its metadata, but not its values")
            if (scale is None) != (meta is None or SCALE not in self.codec.names):
                raise ValueError("the checkpoint has not all of its metadata and scales")
            if meta is None:
                if short_name(name, model) in self.modules:
                    raise ValueError("the checkpoint has its values, but not its metadata")
                return {full_layer_name: weight}
            stored = (weight, meta) if scale is None else (weight, meta, scale)
            self.codec.check(*stored)
            dense = self.codec.decode(*stored)
            if isinstance(model.get_submodule(name), Conv1D):
                dense = dense.t().contiguous()
            if dense.shape != expected.shape:
                raise ValueError(f"it decodes to {tuple(dense.shape)}, the model needs {tuple(expected.shape)}")
            return {full_layer_name: dense}  # in the dtype it was read in: some models keep layers in float32
        except ValueError as error:
            self.problems.append(f"`{name}`: {error}")
            return {full_layer_name: torch.zeros(expected.shape, dtype=expected.dtype)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError  # the quantizer takes the converter off the model after loading


class CompressedHfQuantizer(HfQuantizer):
    """Reads compressed checkpoints: decodes the layers while loading, or replaces them with `CompressedLinear`."""

    requires_calibration = True  # a checkpoint is compressed by ast-export, never while it is loaded
    quantization_config: AstSparse24Config

    def __init__(self, quantization_config: AstSparse24Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._problems: list[str] = []
        self._names: frozenset[str] = frozenset()  # known once there is a model
        self._stored: list[str] = []  # weights that the files have under their names in the model
        self._decoded: set[str] = set()  # layers that are decoded when all weights are loaded

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Append the decoding to the model's own conversions, which stay: fused experts are never compressed.

        One of Laguna also changes names of the model; transformers then takes such a tensor as it is, not decoded.
        """
        if not self.quantization_config.dequantize:
            return weight_conversions
        weight_conversions = [each for each in weight_conversions if not renames(each, self._stored)]
        codec = self.quantization_config.codec
        operation = DecodeWeight(codec, self._names, self._problems)
        return [*weight_conversions, WeightConverter(["weight$", *codec.names[1:]], "weight", [operation])]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._names = frozenset(short_name(name, model) for name in self.quantization_config.modules)
        _check_files(kwargs.get("checkpoint_files") or ())
        keys = {key for file in kwargs.get("checkpoint_files") or () for key in tensor_shapes(Path(file))}
        stored = frozenset(short_name(key, model).removesuffix(f".{META}") for key in keys)
        chosen = linears_of(model, self._names)
        self._stored = [f"{name}.weight" for name in chosen if short_name(name, model) in stored]
        if self.quantization_config.dequantize:
            return
        _check_readers(model, chosen)
        parts = self.quantization_config.codec.names
        for name, part in lacking_parts(model, chosen, parts, keys).items():
            self._problems.append(f"`{name}`: the checkpoint lacks its `{part}`")
        self._raise_problems()
        if self.quantization_config.codec.value_bits is not None:  # their weights are integers
            self._decoded = dtype_asked(model, chosen)
        twins = twins_of(model, self._names)
        for name, layer in list(model.named_modules()):
            if short_name(name, model) not in self._names and name not in twins:
                continue
            if isinstance(layer, Conv1D):
                in_features, out_features = layer.weight.shape
            elif isinstance(layer, nn.Linear):
                out_features, in_features = layer.weight.shape
            else:
                raise ValueError(f"The checkpoint has `{name}` compressed, but it is a {type(layer).__name__}.")
            codec, bias = self.quantization_config.codec, layer.bias is not None
            compressed = CompressedLinear(codec, in_features, out_features, bias, "meta", layer.weight.dtype)
            compressed.is_conv1d = isinstance(layer, Conv1D)
            if name in twins:  # no file holds its metadata
                for key in codec.names[1:]:
                    compressed.register_buffer(key, compressed._buffers[key], persistent=False)
            model.set_submodule(name, compressed)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not any(isinstance(operation, DecodeWeight) for operation in getattr(conversion, "operations", ()))
        ] or None
        twins = twins_of(model, self._names)
        for name, layer in model.named_modules():
            if isinstance(layer, CompressedLinear):
                if name in twins:
                    layer._buffers.update(model.get_submodule(twins[name])._buffers)
                layer.weight.requires_grad_(False)
                self._check_compressed(name, layer)
                if name not in twins:
                    layer.weight.data = in_huge_pages(layer.weight.data)
        self._raise_problems()
        for name in self._decoded:
            layer = model.get_submodule(name)
            if isinstance(layer, CompressedLinear) and not layer.weight.is_meta:  # else it is offloaded
                plain = _plain(layer, layer.dense_weight().detach())
                plain.weight.requires_grad_(False)
                model.set_submodule(name, plain)
        return model

    def _raise_problems(self) -> None:
        if self._problems:
            more = f" (and {len(self._problems) - 1} more layers)" if len(self._problems) > 1 else ""
            raise ValueError(
                f"The compressed checkpoint is damaged: {self._problems[0]}{more}. Copy or export it again."
            )

    def _check_compressed(self, name: str, layer: CompressedLinear) -> None:
        if layer.weight.is_meta:
            return  # offloaded
        try:
            layer.codec.check(*layer.stored)
            shape = layer.codec.dense_shape(layer.weight)
            if shape != (layer.out_features, layer.in_features):
                raise ValueError(f"it decodes to {shape}, the model needs {(layer.out_features, layer.in_features)}")
        except ValueError as error:
            self._problems.append(f"`{name}`: {error}")

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # save_pretrained leaves the name of the dtype in the model's config
            dtype = cast(torch.dtype, getattr(torch, dtype))
        for name, layer in list(model.named_modules()):
            if isinstance(layer, CompressedLinear):
                model.set_submodule(name, _plain(layer, layer.dense_weight().detach().to(dtype or layer.dtype)))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Layers that were decoded later, to merge an adapter into them, are saved as plain layers."""
        kept = {
            short_name(name.removesuffix(".base_layer"), model)
            for name, layer in model.named_modules()
            if isinstance(layer, CompressedLinear) and META in layer._buffers
        }
        modules = [name for name in self.quantization_config.modules if short_name(name, model) in kept]
        for name, layer in list(model.named_modules()):
            if getattr(layer, "is_conv1d", False) and META not in layer._buffers:
                model.set_submodule(name, _plain(layer, layer.weight.detach()))  # its weight is stored as [in, out]
        if not modules and self.quantization_config.modules:
            self.remove_quantization_config(model)
        elif modules != self.quantization_config.modules:
            self.quantization_config.modules = modules
            model.config.quantization_config = self.quantization_config
        return None, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # not the compressed weights, but an adapter over them


def _plain(layer: nn.Module, weight: Tensor) -> nn.Linear | Conv1D:
    """The plain layer that a compressed one replaced, with its decoded weight, given as `[out, in]`."""
    rows, columns = weight.shape
    dense: nn.Linear | Conv1D
    with torch.device("meta"):
        dense = Conv1D(rows, columns) if layer.is_conv1d else nn.Linear(columns, rows, layer.bias is not None)
    dense.weight = nn.Parameter(weight.t().contiguous() if layer.is_conv1d else weight)
    dense.bias = cast(nn.Parameter, layer.bias)
    return dense


def _check_files(checkpoint_files: Iterable[str]) -> None:
    """Compare the files transformers is about to read with the checksums beside them."""
    files = [Path(file) for file in checkpoint_files]
    for folder in {file.parent for file in files}:
        check_checksums(folder, [file for file in files if file.parent == folder])


def _check_readers(model: Any, chosen: dict[str, nn.Module]) -> None:
    """Raise UserError for a layer that an earlier version compressed although the model reads its weight itself."""
    for name, owner in read_past_forward(model, chosen).items():
        raise UserError(
            f"The checkpoint has `{name}` compressed, but {owner} reads its weight without calling its forward, so it "
            "cannot stay compressed in memory. Load without dequantize=False, or export the model again."
        )


def register() -> None:
    """Enter the codecs in transformers' tables, in place of what `registration.py` put there."""
    for codec in codecs().values():
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[codec.method] = AstSparse24Config
        auto.AUTO_QUANTIZER_MAPPING[codec.method] = CompressedHfQuantizer
    # Without this, transformers ignores the `dequantize` that `from_pretrained` is given.
    types: tuple[type, ...] = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if AstSparse24Config not in types:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*types, AstSparse24Config)  # type: ignore[assignment]


register()
