"""What is checked about an export before an engine builds its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ast_sparse.errors import UserError
from ast_sparse.export.codec24 import CODE24
from ast_sparse.export.formats import check_format
from ast_sparse.storage.checksums import check_checksums
from ast_sparse.storage.files import weight_files

# Families of `Conv1D`, whose weights are [in, out]: vLLM transposes every tensor called `.weight` of some layers.
CONV1D_MODELS = (
    "clvp", "clvp_decoder", "clvp_encoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt",
)  # fmt: skip

# A compressed export has the names of transformers' model in memory; in these families vLLM knows only the older ones.
RENAMED_MODELS = ("mixtral",)


def compressed_layers(quantization_config: Mapping[str, Any]) -> list[str]:
    """The names of the compressed layers in the `quantization_config` of a config.json; unknown keys are ignored.

    Raises:
        UserError: the format is newer than this version's, or the names are no list of names.
    """
    method, version = CODE24.method, quantization_config.get("format_version", 1)
    modules = quantization_config.get("modules")
    check_format(quantization_config.get("quant_method", method), version, modules)
    return list(modules or ())


def check_family(model_type: str | None, name: str) -> None:
    """Raise UserError for a family whose compressed exports vLLM would not read as they are."""
    if model_type in CONV1D_MODELS:
        reason = "compressed Conv1D layers vLLM would transpose"
    elif model_type in RENAMED_MODELS:
        reason = "experts a compressed export stores under names that vLLM does not read"
    else:
        return
    raise UserError(
        f"`{name}` is a {model_type} model, whose {reason}. Serve a dense export: ast-export {name} OUT --format dense."
    )


def check_weights(name: str) -> None:
    """Compare the weights of a model with the checksums beside them; a model that is not a folder is left unchecked.

    Raises:
        UserError: a tensor differs, is missing or was added.
    """
    folder = Path(name)
    if folder.is_dir():
        check_checksums(folder, weight_files(folder))
