"""Quantized sources become plain models, or are refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

from ast_sparse.cli.eval import main as evaluate
from ast_sparse.cli.export import main as export
from ast_sparse.cli.prune import main as prune
from ast_sparse.cli.train import main as train
from ast_sparse.config import SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.sparsity.masks import nm_mask
from ast_sparse.sparsity.model import densify_model, sparsify_model
from ast_sparse.storage.files import read_json
from ast_sparse.storage.load import load_causal_lm, random_causal_lm
from ast_sparse.storage.save import save_weights
from tests.export.sparse_models import change_tensors, token_ids
from tests.families import family_model
from tests.models import generated_text, save_tiny_model
from tests.storage.quantized_models import edit_config, plain_twin, save_fp8_model, save_mxfp4_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "blocks": {},
    "blocks-64": {"block": (128, 64)},
    "per-tensor": {"block": None, "activation_scheme": "static"},
    "scale": {"scale": "scale"},
    "skipped": {"modules_to_not_convert": ["lm_head"]},
}


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])  # the second joins its experts while loading
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_fp8_folder_is_a_plain_model_once_loaded_and_once_saved(family: str, layout: str, tmp_path: Path) -> None:
    meant = save_fp8_model(tmp_path / "fp8", family, **LAYOUTS[layout])
    wanted = plain_twin(tmp_path / "twin", family, meant)
    model = load_causal_lm(tmp_path / "fp8")
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in wanted.items())
    save_weights(model, tmp_path / "saved", found)
    assert "quantization_config" not in read_json(tmp_path / "saved" / "config.json")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored.keys() == meant.keys()  # the original format: expert by expert
    assert all(torch.equal(stored[name], value) for name, value in meant.items())


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_ast_train_writes_what_it_trained_from_an_fp8_source(family: str, tmp_path: Path) -> None:
    meant = save_fp8_model(tmp_path / "fp8", family)
    plain_twin(tmp_path / "twin", family, meant)
    (tmp_path / "text.txt").write_text(generated_text())
    for name in ("fp8", "twin"):
        (tmp_path / f"{name}.yaml").write_text(
            f"model: {{name_or_path: {tmp_path / name}}}\n"
            f"data: {{train: {tmp_path / 'text.txt'}, block_size: 64, eval_share: 0}}\n"
            "evaluation: {datasets: [], report: false}\n"
            f"training: {{output_dir: {tmp_path / name}-out, max_steps: 3, per_device_train_batch_size: 2, "
            "learning_rate: 1.0e-3, report_to: none, use_cpu: true}\n"
        )
        result = CliRunner().invoke(train, ["--config", str(tmp_path / f"{name}.yaml")])
        assert result.exit_code == 0, result.output
    found, wanted = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("fp8", "twin"))
    assert found.keys() == wanted.keys() == meant.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == torch.float32 for name, value in wanted.items())
    assert "quantization_config" not in read_json(tmp_path / "fp8-out" / "config.json")


def test_prune_eval_and_export_read_fp8(tmp_path: Path) -> None:
    meant = save_fp8_model(tmp_path / "fp8")
    result = CliRunner().invoke(prune, [str(tmp_path / "fp8"), str(tmp_path / "pruned"), "--method", "magnitude"])
    assert result.exit_code == 0, result.output
    name = "model.layers.0.mlp.up_proj.weight"
    pruned = torch.where(nm_mask(meant[name].abs(), 2, 4), meant[name], 0).bfloat16()
    assert torch.equal(load_file(tmp_path / "pruned" / "model.safetensors")[name], pruned)
    (tmp_path / "text.txt").write_text(generated_text())
    result = CliRunner().invoke(
        evaluate, [str(tmp_path / "fp8"), "--dataset", str(tmp_path / "text.txt"), "--seq-len", "64"]
    )
    assert result.exit_code == 0, result.output

    sparse = save_fp8_model(tmp_path / "sparse", change=lambda w: torch.where(nm_mask(w.abs(), 2, 4), w, 0))
    for dtype in (torch.bfloat16, torch.float32):
        options = ["--dtype", str(dtype).removeprefix("torch."), "--overwrite"]
        result = CliRunner().invoke(export, [str(tmp_path / "sparse"), str(tmp_path / "out"), *options])
        assert result.exit_code == 0, result.output
        assert torch.equal(load_causal_lm(tmp_path / "out", dtype=dtype).get_parameter(name), sparse[name].to(dtype))


def test_a_model_object_that_transformers_decoded_is_saved_plain(tmp_path: Path) -> None:
    save_fp8_model(tmp_path / "fp8", block=None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    assert model._weight_conversions  # which would write codes again
    sparsify_model(model, SparsityConfig())
    wanted = model(token_ids()).logits
    densify_model(model)
    model.save_pretrained(tmp_path / "out")
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "out" / "model.safetensors").values())
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(token_ids()).logits, wanted)


def test_a_model_object_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path))
    model.hf_quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config())
    with pytest.raises(UserError, match="is quantized by fp8, and transformers cannot decode that"):
        sparsify_model(model, SparsityConfig())
    with pytest.raises(UserError, match="Cannot export a quantized model"):
        export_model(model, tmp_path / "out")


def test_random_weights_are_not_called_quantized(tmp_path: Path) -> None:
    save_fp8_model(tmp_path / "fp8")
    assert not hasattr(random_causal_lm(tmp_path / "fp8", 0).config, "quantization_config")


LEFT_OVER = "holds `model.layers.0.self_attn.q_proj.{}` as a quantized model does, and config.json has no"


@pytest.mark.parametrize(
    "name",
    ["weight_scale", "weight_scale_inv", "input_scale", "scales", "qzeros", "qweight", "g_idx", "weight_zero_point",
     "weight.absmax", "weight_packed", "SCB"],
)  # fmt: skip
def test_scales_without_a_quantization_config_are_refused_by_name(name: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({f"model.layers.0.self_attn.q_proj.{name}": torch.ones(1)}))
    with pytest.raises(UserError, match=LEFT_OVER.format(name)):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("family", ["deepseek_v4", "gemma3n_text", "inkling_text", "zaya"])
def test_scales_that_are_parameters_of_the_model_are_read(family: str, tmp_path: Path) -> None:
    family_model(family).save_pretrained(tmp_path)  # deepseek_v4's have other names in the files
    assert any("scale" in name for name in load_file(tmp_path / "model.safetensors"))
    found = load_causal_lm(tmp_path).state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())
    stored = load_file(tmp_path / "model.safetensors")
    layer = next(
        name for name, value in stored.items() if ".0." in name and name.endswith(".weight") and value.dim() == 2
    )
    stale = f"{layer.removesuffix('weight')}scale"  # only its last part is a name of such a model
    change_tensors(tmp_path, lambda tensors: tensors.update({stale: torch.ones(1)}))
    with pytest.raises(UserError, match=f"holds `{stale}` as a quantized model does"):
        load_causal_lm(tmp_path)


def test_scales_of_a_part_that_the_model_lacks_are_not_looked_at(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    other = {"logit_scale": torch.ones(1), "vision_tower.blocks.0.norm.weight": torch.ones(4)}
    other |= {"vision_tower.blocks.0.norm.scale": torch.ones(4), "vision_tower.blocks.0.layer_scale": torch.ones(4)}
    change_tensors(tmp_path, lambda tensors: tensors.update(other))
    load_causal_lm(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_without_a_quantization_config_is_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    with pytest.raises(
        UserError, match=rf"`{key}` is stored as F8_E\dM\d, and config.json has no `quantization_config`"
    ):
        load_causal_lm(tmp_path)


def test_an_fp8_folder_that_lost_a_scale_or_its_config_is_refused(tmp_path: Path) -> None:
    save_fp8_model(tmp_path)
    key = "model.layers.1.mlp.up_proj.weight"
    change_tensors(tmp_path, lambda tensors: tensors.pop(f"{key}_scale_inv"))
    with pytest.raises(UserError, match=f"`{key}` is stored as F8_E4M3 without a scale"):
        load_causal_lm(tmp_path)
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(UserError, match=r"is stored as F8_E4M3, and config\.json has no"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "modelopt"}, "quantized by 'modelopt', which transformers does not know"),
        ({"quant_method": "gptq", "bits": 4}, "quantized by gptq, and transformers cannot decode that"),
        ({"quant_method": "awq", "bits": 4}, "quantized by awq, and transformers cannot decode that"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "package .* not installed. .* pip install bitsandbytes",
        ),
        ({"load_in_8bit": True}, "package .* not installed. .* pip install bitsandbytes"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
            "package .* not installed. .* pip install compressed-tensors",
        ),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "quantized by fp8, and cannot be decoded here"),
        ({"bits": 4}, "names no `quant_method`"),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_every_command(settings: Any, message: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    edit_config(model, quantization_config=settings)
    with pytest.raises(UserError, match=message):
        load_causal_lm(model)
    (tmp_path / "text.txt").write_text(generated_text())
    (tmp_path / "run.yaml").write_text(
        f"model: {{name_or_path: {model}}}\ndata: {{train: {tmp_path / 'text.txt'}, block_size: 32}}\n"
    )
    for command, arguments in (
        (prune, [model, tmp_path / "out", "--method", "magnitude"]),
        (export, [model, tmp_path / "out"]),
        (evaluate, [model, "--dataset", tmp_path / "text.txt"]),
        (train, ["--config", tmp_path / "run.yaml", "--output-dir", tmp_path / "out", "--dry-run"]),
    ):
        result = CliRunner().invoke(command, list(map(str, arguments)))
        assert result.exit_code == 2 and "quantiz" in result.output, (command, result.output)
        assert not (tmp_path / "out").exists()


def test_nothing_is_called_saved_that_does_not_give_back_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text(generated_text())
    for family in ("llama", "gpt2"):
        save_tiny_model(tmp_path / family, family)
    save_fp8_model(tmp_path / "deepseek", "deepseek_v3")

    def rounding(model: Any, folder: Path, weights: dict[str, Any], original_format: bool = True) -> None:
        name = next(name for name in reversed(weights) if name.endswith("norm.weight") or "ln_f.weight" in name)
        save_weights(model, folder, weights | {name: weights[name] + 2**-20}, original_format)

    monkeypatch.setattr("ast_sparse.storage.save.save_weights", rounding)
    for name in ("llama", "gpt2", "deepseek"):
        options = ["--set", f"model.name_or_path={tmp_path / name}", "--output-dir", str(tmp_path / f"{name}-out")]
        result = CliRunner().invoke(train, ["--config", str(_run_file(tmp_path)), *options])
        assert result.exit_code == 2 and "does not read back as the model that was trained: `" in result.output
        assert "norm.weight` differs" in result.output or "ln_f.weight` differs" in result.output
        assert "Saved" not in result.output


def _run_file(folder: Path) -> Path:
    (folder / "run.yaml").write_text(
        f"model: {{name_or_path: none}}\ndata: {{train: {folder / 'text.txt'}, block_size: 64, eval_share: 0}}\n"
        "evaluation: {datasets: [], report: false}\n"
        "training: {max_steps: 1, per_device_train_batch_size: 2, report_to: none, use_cpu: true}\n"
    )
    return folder / "run.yaml"


def test_an_mxfp4_folder_is_a_plain_model_and_without_its_config_it_is_refused(tmp_path: Path) -> None:
    meant = save_mxfp4_model(tmp_path / "mxfp4")
    found = load_causal_lm(tmp_path / "mxfp4")
    assert all(torch.equal(found.state_dict()[name], value) for name, value in meant.items())
    save_weights(found, tmp_path / "saved", found.state_dict())
    assert "quantization_config" not in read_json(tmp_path / "saved" / "config.json")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored.keys() == meant.keys() and all(torch.equal(stored[name], value) for name, value in meant.items())
    edit_config(tmp_path / "mxfp4", quantization_config=None)
    with pytest.raises(UserError, match=r"experts\.down_proj_scales` as a quantized model does"):
        load_causal_lm(tmp_path / "mxfp4")
