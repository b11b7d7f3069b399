"""Exports end to end: from models and folders, verified, refused, interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, T5Config, T5ForConditionalGeneration

from ast_sparse.config import SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.export import export as checkpoint
from ast_sparse.export.export import export_model
from ast_sparse.kernels.code24 import unpack24
from ast_sparse.sparsity.masks import check_nm, nm_mask
from ast_sparse.sparsity.model import densify_model, sparse_layers, sparsify_model
from ast_sparse.storage import save as saving
from ast_sparse.storage.files import read_json, tensor_shapes, weight_files
from ast_sparse.storage.save import save_sparse_model
from tests.export.sparse_models import (
    change_tensors,
    masked_state,
    plain_sparse_model,
    save_training_checkpoint,
    sparse_model,
    token_ids,
)
from tests.models import FAMILIES, save_tiny_model, tiny_model, tiny_tokenizer
from tests.processes import run_python

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def loaded_state(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("format", ["dense", "compressed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_gives_back_the_masked_weights_to_the_bit(family: str, format: str, dtype: str, tmp_path: Path) -> None:
    model = sparse_model(family)
    report = export_model(model, tmp_path / "out", format, dtype=dtype)
    expected = masked_state(model, getattr(torch, dtype))
    state = loaded_state(tmp_path / "out")
    assert same(state, expected)
    for name, layer in sparse_layers(model).items():
        weight = state[f"{name}.weight"]
        assert check_nm(weight, 2, 4, dim=layer.group_dim)
        assert not (weight == 0).logical_and(weight.signbit()).any()
    config = read_json(tmp_path / "out" / "config.json")
    assert config["dtype"] == dtype and ("quantization_config" in config) == (format == "compressed")
    assert report.pruned.layers == len(sparse_layers(model)) and report.nonzero_share == 0.5
    assert report.pruned.ratio == {"dense": 1, "compressed": 0.53125 if dtype == "float32" else 0.5625}[format]


def test_compressed_layers_take_nine_sixteenths_in_the_file(tmp_path: Path) -> None:
    model = sparse_model("opt")
    report = export_model(model, tmp_path / "out")
    shapes = tensor_shapes(tmp_path / "out" / "model.safetensors")
    for name, layer in sparse_layers(model).items():
        out_features, in_features = layer.weight.shape
        assert shapes[f"{name}.weight"] == ("BF16", [out_features, in_features // 2])
        assert shapes[f"{name}.weight_meta"] == ("U8", [out_features, in_features // 8])
    numel = sum(layer.weight.numel() for layer in sparse_layers(model).values())
    assert report.pruned.parameters == numel and report.pruned.stored_bytes == 0.5625 * 2 * numel
    stored = sum(value.nbytes for value in load_file(tmp_path / "out" / "model.safetensors").values())
    assert report.rows[-1].stored_bytes == stored
    assert report.files == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}


def test_logits_in_a_fresh_process_equal_those_of_the_masked_dense_model(tmp_path: Path) -> None:
    code = """
import sys, torch, ast_sparse
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder = sys.argv[1]
ids = torch.load(f"{folder}/ids.pt")
logits = {f: AutoModelForCausalLM.from_pretrained(f"{folder}/{f}").eval()(ids).logits for f in sys.argv[2:]}
torch.save(logits, f"{folder}/logits.pt")
"""
    torch.save(token_ids(), tmp_path / "ids.pt")
    references = {}
    for family in ("llama", "gpt2"):
        model = sparse_model(family)
        for format in ("dense", "compressed"):
            export_model(model, tmp_path / f"{family}-{format}", format)
        densify_model(model)
        model.to(torch.bfloat16).save_pretrained(tmp_path / "reference")
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "reference").eval()
        references |= {f"{family}-{format}": reference(token_ids()).logits for format in ("dense", "compressed")}
    run_python(code, tmp_path, *references)
    logits = torch.load(tmp_path / "logits.pt")
    for name, reference in references.items():
        assert logits[name].dtype == torch.bfloat16
        assert torch.equal(logits[name].view(torch.int16), reference.view(torch.int16))


@pytest.mark.parametrize("slorb_k", [None, 8])
@pytest.mark.parametrize("kind", ["training checkpoint", "saved model", "export", "dense export"])
def test_every_kind_of_folder_exports_like_the_model(kind: str, slorb_k: int | None, tmp_path: Path) -> None:
    model = sparse_model("gpt2", slorb_k)
    source = tmp_path / "source"
    if kind == "training checkpoint":
        save_training_checkpoint(model, source)
    elif kind == "saved model":
        save_sparse_model(model, source, {"pattern": "2:4", "slorb": {"enabled": slorb_k is not None}})
    else:
        export_model(model, source, "dense" if kind == "dense export" else "compressed", dtype="float32")
    export_model(source, tmp_path / "from_folder")
    export_model(model, tmp_path / "from_model")
    files = [load_file(weight_files(tmp_path / name)[0]) for name in ("from_folder", "from_model")]
    assert same(*files)
    assert (tmp_path / "from_folder" / "slorb").exists() == (slorb_k is not None)
    if slorb_k:
        adapters = [tmp_path / name / "slorb" / "adapter_model.safetensors" for name in ("from_folder", "from_model")]
        assert same(*map(load_file, adapters))


def test_exporting_does_not_change_the_model(tmp_path: Path) -> None:
    model = sparse_model(slorb_k=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    export_model(model, tmp_path / "out")
    assert same(model.state_dict(), before) and model.config.to_dict() == config


def test_tokenizer_and_generation_config_travel_along(tmp_path: Path) -> None:
    source = save_training_checkpoint(sparse_model(), tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "optimizer.pt").write_text("")
    export_model(source, tmp_path / "out")
    out = tmp_path / "out"
    text = "the sparse model"
    assert AutoTokenizer.from_pretrained(out)(text) == tiny_tokenizer()(text)
    assert read_json(out / "generation_config.json")["temperature"] == 0.5
    assert (out / "chat_template.jinja").is_file() and not (out / "optimizer.pt").exists()
    export_model(sparse_model(), tmp_path / "given", tokenizer=tiny_tokenizer())
    assert AutoTokenizer.from_pretrained(tmp_path / "given")(text) == tiny_tokenizer()(text)


def test_sparsity_config_is_copied_or_written(tmp_path: Path) -> None:
    model = sparse_model()
    export_model(model, tmp_path / "out")
    written = read_json(tmp_path / "out" / "sparsity_config.json")
    layers = sorted(sparse_layers(model))
    assert written == {"pattern": "2:4", "slorb": {"enabled": False}, "layers": layers}
    save_sparse_model(model, tmp_path / "source", {"pattern": "2:4", "note": "mine"})
    export_model(tmp_path / "source", tmp_path / "again")
    assert read_json(tmp_path / "again" / "sparsity_config.json") == {"pattern": "2:4", "note": "mine"}


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_foreign_model_is_exported_by_its_non_zeros(format: str, tmp_path: Path) -> None:
    model = plain_sparse_model()
    with torch.no_grad():
        model.get_parameter(Q_PROJ)[0] = 0.0  # groups with fewer than two non-zeros
        model.get_parameter(Q_PROJ)[1] *= -1  # leaves -0.0
    model.save_pretrained(tmp_path / "source")
    report = export_model(tmp_path / "source", tmp_path / "out", format)
    state = loaded_state(tmp_path / "out")
    assert torch.equal(state[Q_PROJ], model.get_parameter(Q_PROJ).bfloat16())
    assert not (state[Q_PROJ] == 0).logical_and(state[Q_PROJ].signbit()).any()
    assert report.nonzero_share < 0.5


def test_layers_the_user_excluded_stay_dense_and_are_reported(tmp_path: Path) -> None:
    model = tiny_model()
    sparsify_model(model, SparsityConfig(exclude=("down_proj",)))
    report = export_model(model, tmp_path / "out")
    names = {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert report.dense_layers == dict.fromkeys(names, "not 2:4")
    assert report.others[0].layers == 2
    assert not names & set(read_json(tmp_path / "out" / "config.json")["quantization_config"]["modules"])
    assert "left dense: 2 layers, e.g. model.layers.0.mlp.down_proj: not 2:4" in report.lines()


def test_in_features_that_are_no_multiple_of_eight_stay_uncompressed(tmp_path: Path) -> None:
    model = tiny_model()
    for block in model.model.layers:
        block.mlp.down_proj = torch.nn.Linear(44, 32, bias=False)
        block.mlp.gate_proj = torch.nn.Linear(32, 44, bias=False)
        block.mlp.up_proj = torch.nn.Linear(32, 44, bias=False)
    model.config.intermediate_size = 44
    sparsify_model(model, SparsityConfig())
    report = export_model(model, tmp_path / "out")
    assert {reason.split(",")[0] for reason in report.dense_layers.values()} == {"2:4"}
    assert same(loaded_state(tmp_path / "out"), masked_state(model, torch.bfloat16))


def test_dense_model_is_refused_with_the_first_layer_and_its_groups(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source")
    message = r"not 2:4: in `model.layers.0.self_attn.q_proj` 256 of 256 groups of 4 hold more than 2 non-zeros"
    for format in ("dense", "compressed"):
        with pytest.raises(UserError, match=message):
            export_model(source, tmp_path / "out", format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_recorded_layer_that_is_not_nm_is_refused(tmp_path: Path) -> None:
    model = sparse_model()
    save_sparse_model(model, tmp_path / "source", {"pattern": "2:4", "layers": sorted(sparse_layers(model))})
    name = "model.layers.1.mlp.up_proj"
    change_tensors(tmp_path / "source", lambda tensors: tensors[f"{name}.weight"][0, :4].fill_(1.0))
    with pytest.raises(UserError, match=f"in `{name}` 1 of 384 groups"):
        export_model(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("pattern", ["1:4", "2:8"])
def test_sparser_patterns_fit_the_compressed_format(pattern: str, tmp_path: Path) -> None:
    model = sparse_model(pattern=pattern)
    report = export_model(model, tmp_path / "out")
    assert report.pattern == pattern and report.pruned.ratio == 0.5625
    assert same(loaded_state(tmp_path / "out"), masked_state(model, torch.bfloat16))


def test_other_patterns_are_exported_dense_only(tmp_path: Path) -> None:
    model = sparse_model(pattern="4:8")
    with pytest.raises(UserError, match=r"compressed format holds 2:4, but the model is 4:8: .* Use --format dense"):
        export_model(model, tmp_path / "out")
    report = export_model(model, tmp_path / "out", "dense")
    assert report.pattern == "4:8" and same(loaded_state(tmp_path / "out"), masked_state(model, torch.bfloat16))


def test_pattern_of_a_foreign_model_is_named_by_the_caller(tmp_path: Path) -> None:
    plain_sparse_model(pattern="4:8").save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="name its pattern with --pattern"):
        export_model(tmp_path / "source", tmp_path / "out", "dense")
    assert export_model(tmp_path / "source", tmp_path / "out", "dense", pattern="4:8").pattern == "4:8"


def test_sharded_checkpoint_is_read(tmp_path: Path) -> None:
    model = sparse_model()
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(weight_files(tmp_path / "source")) > 2
    export_model(tmp_path / "source", tmp_path / "out")
    assert same(loaded_state(tmp_path / "out"), masked_state(model, torch.bfloat16))
    weight_files(tmp_path / "source")[1].unlink()
    with pytest.raises(UserError, match="which is missing"):
        export_model(tmp_path / "source", tmp_path / "again")


def test_fused_experts_stay_dense_and_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_local_experts=4, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    sparsify_model(model, SparsityConfig())
    for format in ("dense", "compressed"):
        export_model(model, tmp_path / format, format)
        assert same(loaded_state(tmp_path / format), masked_state(model, torch.bfloat16))
    export_model(tmp_path / "compressed", tmp_path / "again", "dense")
    assert same(loaded_state(tmp_path / "again"), masked_state(model, torch.bfloat16))


def test_tiny_kept_weight_that_rounds_to_zero_is_harmless(tmp_path: Path) -> None:
    model = sparse_model()
    layer = sparse_layers(model)[Q_PROJ.removesuffix(".weight")]
    with torch.no_grad():
        layer.weight[layer.mask] = torch.where(torch.rand(layer.weight.numel() // 2) < 0.5, -1e-9, 1.0)
    export_model(model, tmp_path / "out", dtype="float16")
    state = loaded_state(tmp_path / "out")
    assert torch.equal(state[Q_PROJ], masked_state(model, torch.float16)[Q_PROJ])
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = unpack24(torch.ones_like(stored[Q_PROJ]), stored[f"{Q_PROJ}_meta"])
    assert torch.equal(kept.bool(), layer.mask)  # encoded from the mask: a kept zero is kept
    assert not (state[Q_PROJ] == 0).logical_and(state[Q_PROJ].signbit()).any()


@pytest.mark.parametrize(("value", "message"), [(1e6, "too large for torch.float16"), (float("nan"), "not finite")])
def test_values_the_dtype_cannot_hold_are_refused(value: float, message: str, tmp_path: Path) -> None:
    model = sparse_model()
    with torch.no_grad():
        model.model.norm.weight[0] = value
    with pytest.raises(UserError, match=f"`model.norm.weight` holds values .*{message}"):
        export_model(model, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", ["save_weights", "_edit_config", "_verify", "_report"])
def test_interrupted_export_leaves_the_output_as_it_was(
    step: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse_model()
    export_model(model, tmp_path / "out", "dense")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    original = getattr(checkpoint, step)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise error

    monkeypatch.setattr(checkpoint, step, interrupted)
    for out, overwrite in ((tmp_path / "new", False), (tmp_path / "out", True)):
        with pytest.raises(error):
            export_model(model, out, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def _flip_a_value(tensors: dict[str, Tensor]) -> None:
    tensors[Q_PROJ][0, 0] += 1


def _swap_positions(tensors: dict[str, Tensor]) -> None:
    meta = tensors[f"{Q_PROJ}_meta"]
    meta[0, 0] = 0x44 if meta[0, 0] != 0x44 else 0x99


def _break_a_nibble(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q_PROJ}_meta"][0, 0] = 0xFF


@pytest.mark.parametrize("damage", [_flip_a_value, _swap_positions, _break_a_nibble])
def test_file_that_reads_back_different_is_not_kept(
    damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(model: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        saving.save_weights(model, folder, *args, **kwargs)
        change_tensors(folder, damage)

    monkeypatch.setattr(checkpoint, "save_weights", damaged)
    with pytest.raises(UserError, match=f"{Q_PROJ.removesuffix('.weight')}"):
        export_model(sparse_model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_damaged_source_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    source = save_training_checkpoint(sparse_model(), tmp_path / "source")
    file = source / "model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-8], b"\xff" * 64, b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=f"`{file}` is damaged"):
            export_model(source, tmp_path / "out")
    file.write_bytes(content)
    (source / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        export_model(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    model = sparse_model()
    for arguments, message in (
        ({"format": "zip"}, "Unknown export format 'zip'. Use dense or compressed."),
        ({"dtype": "int8"}, "Unknown export dtype 'int8'"),
        ({"pattern": "4:2"}, "needs 0 < N < M"),
    ):
        with pytest.raises(UserError, match=message):
            export_model(model, tmp_path / "out", **arguments)
    with pytest.raises(UserError, match="Cannot export a Linear"):
        export_model(torch.nn.Linear(4, 4), tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Cannot export a T5ForCond.*: AutoModelForCausalLM would not load it"):
        export_model(T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, num_layers=1)), tmp_path / "out")


def test_mask_of_a_training_checkpoint_beats_the_magnitude(tmp_path: Path) -> None:
    model = sparse_model()
    export_model(save_training_checkpoint(model, tmp_path / "source"), tmp_path / "out", dtype="float32")
    state = loaded_state(tmp_path / "out")
    layer = sparse_layers(model)[Q_PROJ.removesuffix(".weight")]
    assert torch.equal(state[Q_PROJ] != 0, layer.mask)
    assert not torch.equal(layer.mask, nm_mask(layer.weight.abs()))


@pytest.mark.parametrize("layers", [5, [1], "all"])
def test_recorded_layers_that_are_no_names_are_refused(tmp_path: Path, layers: object) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "sparsity_config.json").write_text(json.dumps({"pattern": "2:4", "layers": layers}))
    with pytest.raises(UserError, match="`layers` is not a list of names"):
        export_model(folder, tmp_path / "out")
