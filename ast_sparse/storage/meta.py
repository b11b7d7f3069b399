"""A model without weights: its configuration, and its modules on the meta device."""

import math
import warnings
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ast_sparse.config import ModelConfig
from ast_sparse.errors import UserError, one_line
from ast_sparse.storage.companions import companion_files
from ast_sparse.storage.files import sparse_keys, tensor_shapes, weight_files
from ast_sparse.storage.locate import Place, load_model_config
from ast_sparse.storage.model_kind import check_outputs, check_reloads
from ast_sparse.storage.origin import check_saving, hub_commit, read_generation_config, source_folder
from ast_sparse.storage.packed import decode_on_load
from ast_sparse.storage.quantized import forget_quantization
from ast_sparse.storage.slorb_adapter import adapter_home

_LARGEST_TENSOR = 2**40  # entries; more is a mistake in a config
_LONGEST_REASON = 200  # characters of another library's error that are shown


def meta_student(model: ModelConfig) -> PreTrainedModel:
    """The dense model on the meta device: its configuration and files are checked, no weight is loaded.

    Raises:
        UserError: the model cannot be found or built, or its files are damaged or sparse already.
    """
    config = student_config(model)
    built = meta_model(model, config)
    check_savable(model, config, built)
    return built


def student_config(model: ModelConfig, reads_weights: bool = True) -> PreTrainedConfig:
    path = Path(model.name_or_path).expanduser()
    if model.revision is not None and path.exists():
        raise UserError(
            f"model.revision={model.revision!r} is for a model on the hub, but {model.name_or_path!r} is local. "
            "Remove it.",
            "model.revision",
        )
    for key, value in model.config_overrides.items():
        if "drop" in key and isinstance(value, int | float) and not 0 <= value < 1:
            raise UserError(f"model.config_overrides.{key}={value} must be 0 or more and below 1.")
    config = load_model_config(
        model.name_or_path,
        revision=model.revision,
        gguf_file=model.gguf_file,
        trust_remote_code=model.trust_remote_code,
        config_overrides=model.config_overrides,
    )
    if reads_weights:
        _check_dense(Place.find(model.name_or_path, model.gguf_file), hub_commit(config) or model.revision)
        decode_on_load(config, model.name_or_path)
    forget_quantization(config)  # a plan counts the decoded model
    return config


def has_config_alone(model: ModelConfig) -> bool:
    """Whether a folder holds no weights, which a plan does not need."""
    folder = Path(model.name_or_path).expanduser()
    weights = ("*.safetensors", "*.safetensors.index.json", "*.bin")
    return folder.is_dir() and model.gguf_file is None and not any(any(folder.glob(name)) for name in weights)


def _check_dense(place: Place, revision: str | None) -> None:
    """Raise UserError if the files are damaged, or if they hold masks or SLoRB, which training would add again."""
    folder = place.model_folder
    names = [] if folder is None else [name for file in weight_files(folder) for name in tensor_shapes(file)]
    if sparse_keys(names)[0] or adapter_home(place, revision) is not None:
        raise UserError(
            f"model.name_or_path={place.name!r} is the result of a run, with masks or SLoRB. Name the dense model, "
            "or continue the run with --resume."
        )


def meta_model(model: ModelConfig, config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights."""

    def build(attn_implementation: str | None) -> PreTrainedModel:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation=attn_implementation,
                trust_remote_code=model.trust_remote_code,
            )

    try:
        built = build(model.attn_implementation)
        sizes = {name: math.prod(parameter.shape) for name, parameter in built.named_parameters()}
        if name := next((name for name, size in sizes.items() if not 0 < size < _LARGEST_TENSOR), None):
            raise ValueError(f"`{name}` would have shape {tuple(built.get_parameter(name).shape)}")
        return built
    except Exception as error:  # impossible values in a config can make the model's code raise anything
        reason = one_line(error, _LONGEST_REASON, cut="marked", end="open", named=True)
    if model.attn_implementation is not None:
        try:
            build(None)
        except Exception:  # the configuration is to blame, not the attention
            pass
        else:
            raise UserError(
                f"model.attn_implementation={model.attn_implementation!r} cannot be used: {reason}. "
                "Use sdpa or eager, or remove it."
            )
    overrides = " and model.config_overrides" if model.config_overrides else ""
    raise UserError(f"The model of {model.name_or_path!r} cannot be built: {reason}. Check its config.json{overrides}.")


def check_savable(model: ModelConfig, config: PreTrainedConfig, built: PreTrainedModel) -> None:
    """Check that what a run saves beside the weights can be read and written."""
    check_reloads(built, model.name_or_path)
    check_outputs(built)
    folder = source_folder(config)
    generation = None if folder is None else read_generation_config(folder)
    if folder is not None:
        companion_files(folder)
    check_saving(model.name_or_path, config, generation)
