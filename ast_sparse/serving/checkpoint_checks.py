"""What is checked about an export before an engine builds its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ast_sparse.errors import UserError
from ast_sparse.export.codec24 import CODE24
from ast_sparse.export.formats import check_format
from ast_sparse.export.vllm_families import vllm_refusal
from ast_sparse.storage.checksums import check_checksums
from ast_sparse.storage.files import weight_files

_RANK_FILES = ("model-rank-", "model-pp-")  # of `ShardedStateLoader`


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
    reason = vllm_refusal(model_type)
    if reason is None:
        return
    raise UserError(
        f"`{name}` is a {model_type} model, whose {reason}. Serve a dense export: ast-export {name} OUT --format dense."
    )


def check_weights(name: str) -> None:
    """Compare the weights of a model with the checksums beside them.

    Left unchecked are a model that is not a folder, what vLLM has saved for `--load-format sharded_state` under names
    of its own, and a folder without weights, for `--load-format dummy`: for any other, vLLM says that they are missing.

    Raises:
        UserError: a tensor differs, is missing or was added.
    """
    folder = Path(name)
    if any(not file.name.startswith(_RANK_FILES) for file in folder.glob("*.safetensors")):
        check_checksums(folder, weight_files(folder))
