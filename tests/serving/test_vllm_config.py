"""What vLLM learns about a checkpoint: which layers the plug-in runs, and what it refuses."""

import copy
import pickle
import shutil
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ast_sparse import export_model
from ast_sparse.errors import UserError
from ast_sparse.storage.files import read_json
from tests.export.sparse_models import sparse_model
from tests.processes import ROOT, run_python
from tests.serving.vllm_stand_in import LinearBase, UnquantizedLinearMethod

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYERS = [f"model.layers.{layer}" for layer in range(2)]
BUILT = [f"{layer}.{name}" for layer in LAYERS for name in (
    "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj",
)]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_model(sparse_model(slorb_k=8), folder / "out")
    return folder / "out"


def config_of(folder: Path) -> Any:
    from ast_sparse.serving.vllm_config import Vllm24Config

    config = Vllm24Config.from_config(read_json(folder / "config.json")["quantization_config"])
    config.packed_modules_mapping = MERGED
    return config


def test_the_entry_point_of_vllm_is_the_function_that_registers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["ast_sparse_24"].split(":")
    assert callable(getattr(import_module(module), name))
    for required in (project["dependencies"], *project["optional-dependencies"].values()):
        assert not [each for each in required if "vllm" in each]


def test_registering_imports_nothing_heavy_although_vllm_has_imported_transformers() -> None:
    run_python("""
import sys
import transformers.quantizers.auto
from tests.serving import vllm_stand_in
vllm_stand_in.install()
before = set(sys.modules)
from ast_sparse.serving.plugin import register
register()
register()
assert [cls.__name__ for cls in vllm_stand_in.REGISTERED.values()] == ["Vllm24Config", "Vllm24Int4Config"]
assert list(vllm_stand_in.REGISTERED) == ["ast_sparse_24", "ast_sparse_24_int4"]
new = {name for name in set(sys.modules) - before if not name.startswith("ast_sparse")}
assert not {name.split(".")[0] for name in new} & {"transformers", "datasets", "accelerate", "peft"}, new
assert not {"ast_sparse.export.quantizer", "ast_sparse.serving.vllm_linear"} & set(sys.modules)
""")


def test_every_layer_of_the_checkpoint_is_run_by_the_plugin(vllm: None, exported: Path) -> None:
    config = config_of(exported)
    for name in BUILT:
        assert type(config.get_quant_method(LinearBase(), name)).__name__ == "Vllm24LinearMethod"
    assert isinstance(config.get_quant_method(LinearBase(), "lm_head"), UnquantizedLinearMethod)
    assert config.get_quant_method(SimpleNamespace(), "model.embed_tokens") is None
    assert config.get_checkpoint_weight_mapper() == "the mapper of vLLM"


def test_layers_of_a_draft_model_are_run_by_the_plugin(vllm: None, exported: Path) -> None:
    """In speculative decoding vLLM puts a word before the names of the smaller model."""
    config = config_of(exported)
    for name in BUILT:
        assert type(config.get_quant_method(LinearBase(), f"draft_model.{name}")).__name__ == "Vllm24LinearMethod"
    config.check_all_built()


def test_a_layer_that_vllm_did_not_build_is_an_error_before_weights_are_read(vllm: None, exported: Path) -> None:
    config = config_of(exported)
    for name in BUILT[1:]:
        config.get_quant_method(LinearBase(), name)
    with pytest.raises(UserError, match=r"`model.layers.0.self_attn.k_proj` \(and 2 more\) compressed"):
        config.get_checkpoint_weight_mapper()


def test_a_process_with_a_part_of_the_layers_expects_only_those(vllm_in_two_stages: None, exported: Path) -> None:
    config = config_of(exported)
    config.get_quant_method(LinearBase(), BUILT[0])
    config.check_all_built()


def test_names_are_mapped_to_those_of_vllm(vllm: None, exported: Path) -> None:
    config = config_of(exported)
    mapper = SimpleNamespace(apply_list=lambda names: [name.replace("model.", "language_model.") for name in names])
    config.apply_vllm_mapper(mapper)
    found = config.get_quant_method(LinearBase(), "language_model.layers.1.mlp.gate_up_proj")
    assert found.parts == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]


def test_a_model_that_is_not_compressed_is_refused_by_its_option(vllm: None) -> None:
    """vLLM makes a config of nothing if the method was named by hand and config.json names none."""
    from ast_sparse.serving.vllm_config import Vllm24Int4Config

    with pytest.raises(UserError, match=r"quantization=ast_sparse_24_int4 is for compressed exports.* Drop it"):
        Vllm24Int4Config()


def test_what_is_asked_once_reaches_the_processes_that_vllm_starts(vllm: None, exported: Path) -> None:
    config = config_of(exported)
    config.maybe_update_config(str(exported), hf_config=SimpleNamespace(model_type="llama", ast_sparse_slorb=True))
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert copied.slorb.folder == exported / "slorb" and copied.modules == config.modules


def test_without_the_setting_no_adapter_is_read(vllm: None, exported: Path) -> None:
    config = config_of(exported)
    config.maybe_update_config(str(exported), hf_config=SimpleNamespace(model_type="llama"))
    assert config.slorb is None


def test_files_and_family_are_checked_before_the_model_is_built(vllm: None, exported: Path, tmp_path: Path) -> None:
    exported = Path(shutil.copytree(exported, tmp_path / "out"))
    config = config_of(exported)
    with pytest.raises(UserError, match="is a gpt2 model"):
        config.maybe_update_config(str(exported), hf_config=SimpleNamespace(model_type="gpt2"))
    file = exported / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="is damaged"):
        config.maybe_update_config(str(exported), hf_config=SimpleNamespace(model_type="llama"))


def test_vllm_is_told_dtypes_and_that_everything_is_in_the_config(vllm: None, exported: Path) -> None:
    config = config_of(exported)
    assert config.get_name() == "ast_sparse_24" and config.get_config_filenames() == []
    assert [str(dtype) for dtype in config.get_supported_act_dtypes()] == [
        "torch.bfloat16", "torch.float16", "torch.float32",
    ]  # fmt: skip
    assert config.get_min_capability() == 70
