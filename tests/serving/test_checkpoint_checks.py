"""What is refused before an engine builds its model."""

import importlib
import re
from pathlib import Path

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from ast_sparse import export_model
from ast_sparse.errors import UserError
from ast_sparse.export.vllm_families import CONV1D_MODELS
from ast_sparse.serving.checkpoint_checks import check_family, check_weights, compressed_layers
from ast_sparse.storage.files import read_json
from tests.export.sparse_models import sparse_model


def test_the_layers_of_an_export_are_those_of_its_config(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert compressed_layers(config) == config["modules"] != []
    assert compressed_layers({**config, "a_later_key": 1}) == config["modules"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"format_version": 2}, "format_version 2, newer than 1, the latest this ast_sparse reads. Update ast_sparse."),
        ({"format_version": "1"}, "format_version='1' is not a version"),
        ({"modules": {"a": 1}}, r"modules=\{'a': 1\} is not a list of names"),
        ({"modules": [1]}, r"modules=\[1\] is not a list of names"),
    ],
)
def test_a_config_that_this_version_cannot_read_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compressed_layers({"quant_method": "ast_sparse_24", "modules": ["a"], **changed})


def test_a_damaged_byte_of_the_values_is_found(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out")
    check_weights(str(tmp_path / "out"))
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors` is damaged: `.*` does not have the checksum"):
        check_weights(str(tmp_path / "out"))


def test_files_that_vllm_wrote_and_a_folder_without_weights_are_left_to_vllm(tmp_path: Path) -> None:
    """For its load formats `sharded_state` and `dummy`."""
    export_model(sparse_model(), tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.rename(tmp_path / "out" / "model-rank-0-part-0.safetensors")
    check_weights(str(tmp_path / "out"))
    (tmp_path / "out" / "model-rank-0-part-0.safetensors").rename(tmp_path / "out" / "model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        check_weights(str(tmp_path / "out"))
    (tmp_path / "out" / "model-00001-of-00001.safetensors").unlink()
    check_weights(str(tmp_path / "out"))


def test_a_model_that_is_not_a_folder_is_not_looked_for() -> None:
    check_weights("someone/some-model")


def test_a_conv1d_family_is_refused_in_one_line_with_the_way_out() -> None:
    with pytest.raises(UserError) as error:
        check_family("gpt2", "exported")
    assert str(error.value) == (
        "`exported` is a gpt2 model, whose compressed Conv1D layers vLLM would transpose. Serve a dense export: "
        "ast-export exported OUT --format dense."
    )
    for family in ("mixtral", "deepseek_v3", "lfm2_moe"):
        with pytest.raises(UserError, match=rf"is a {family} model, whose experts .* Serve a dense export: ast-export"):
            check_family(family, "exported")
    check_family("llama", "exported")
    check_family(None, "exported")


def test_the_conv1d_families_are_those_of_the_installed_transformers() -> None:
    folder = Path(transformers.__file__).parent / "models"
    modules = {path.parent.name for path in folder.glob("*/modeling_*.py") if uses_conv1d(path)}
    families = {name for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) in modules}
    assert families == set(CONV1D_MODELS)
    assert importlib.import_module("transformers.pytorch_utils").Conv1D


def uses_conv1d(path: Path) -> bool:
    return bool(re.search(r"pytorch_utils import [^\n]*\bConv1D\b", path.read_text(encoding="utf-8")))
