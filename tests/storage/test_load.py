"""Loading from every kind of place, and the errors when it fails."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.storage.files import tokenizer_files
from ast_sparse.storage.load import load_causal_lm, load_checkpoint
from ast_sparse.storage.locate import load_model_config, load_tokenizer
from ast_sparse.storage.save import save_sparse_model
from tests.export.sparse_models import change_tensors, masked_state, save_training_checkpoint, sparse_model, token_ids
from tests.fuzz.mutate import evil_pickle, read_safetensors, write_safetensors
from tests.models import FAMILIES, save_tiny_model, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def test_dense_folder_loads_as_it_is(folder: Path) -> None:
    model = load_causal_lm(folder)
    assert not model.training and model.dtype == torch.float32
    assert torch.equal(model(token_ids()).logits, tiny_model().eval()(token_ids()).logits)
    text = "the sparse model"
    assert load_tokenizer(folder)(text) == tiny_tokenizer()(text)
    assert load_model_config(folder).hidden_size == 32


@pytest.mark.parametrize("slorb_k", [None, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_checkpoint_computes_what_training_computed(family: str, slorb_k: int | None, tmp_path: Path) -> None:
    model = sparse_model(family, slorb_k)
    loaded = load_causal_lm(save_training_checkpoint(model, tmp_path / "checkpoint-3"))
    assert not sparse_layers(loaded)
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("slorb_k", [None, 8])
@pytest.mark.parametrize("kind", ["saved", "dense", "compressed"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_model_and_exports_compute_what_training_computed(
    family: str, kind: str, slorb_k: int | None, tmp_path: Path
) -> None:
    model = sparse_model(family, slorb_k)
    if kind == "saved":
        save_sparse_model(model, tmp_path / "out", {"slorb": None if slorb_k is None else {"enabled": True}})
    else:
        export_model(model, tmp_path / "out", kind, dtype="float32")
    loaded = load_causal_lm(tmp_path / "out")
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)


def test_parts_of_a_training_checkpoint_are_told_apart(tmp_path: Path) -> None:
    model = sparse_model(slorb_k=8)
    checkpoint = load_checkpoint(save_training_checkpoint(model, tmp_path / "source"))
    layers = sparse_layers(model)
    assert checkpoint.masks.keys() == checkpoint.slorb.keys() == layers.keys()
    assert all(torch.equal(mask, layers[name].mask) for name, mask in checkpoint.masks.items())
    expected = masked_state(model, torch.float32)
    state = checkpoint.model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_masks_and_slorb_raise_no_warning_but_foreign_tensors_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save_training_checkpoint(sparse_model(slorb_k=8), tmp_path / "source")
    with caplog.at_level(logging.WARNING):
        load_checkpoint(source)
    assert not caplog.records
    change_tensors(source, lambda tensors: tensors.update({"other.weight": torch.ones(2)}))
    with caplog.at_level(logging.WARNING):
        load_checkpoint(source)
    assert "1 tensors of the checkpoint are not used, e.g. other.weight" in caplog.text


def test_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out")
    assert load_causal_lm(tmp_path / "out").dtype == torch.float32
    assert load_causal_lm(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert load_causal_lm(tmp_path / "out", dtype=torch.float16).dtype == torch.float16


def test_adapter_in_the_folder_is_used_unless_switched_off(tmp_path: Path) -> None:
    model = sparse_model(slorb_k=8)
    save_sparse_model(model, tmp_path, {"slorb": {"enabled": False}})
    assert not load_checkpoint(tmp_path).slorb
    save_sparse_model(model, tmp_path, {"slorb": {"enabled": True}})
    assert load_checkpoint(tmp_path).slorb
    (tmp_path / "sparsity_config.json").unlink()
    assert load_checkpoint(tmp_path).slorb


def test_missing_adapter_is_not_passed_over(tmp_path: Path) -> None:
    save_sparse_model(sparse_model(slorb_k=8), tmp_path, {"slorb": {"enabled": True}})
    shutil.rmtree(tmp_path / "slorb")
    with pytest.raises(UserError, match=r"was trained with SLoRB, but its adapter .* is missing"):
        load_causal_lm(tmp_path)


def test_config_overrides_replace_values(folder: Path) -> None:
    overrides = {"rms_norm_eps": 0.5}
    assert load_model_config(folder, config_overrides=overrides).rms_norm_eps == 0.5
    assert load_causal_lm(folder, config_overrides=overrides).config.rms_norm_eps == 0.5
    with pytest.raises(UserError, match=r"LlamaConfig has no `rms_norm_epz`\. Did you mean `rms_norm_eps`\?"):
        load_model_config(folder, config_overrides={"rms_norm_epz": 0.5})


def test_attention_is_the_one_asked_for(folder: Path) -> None:
    assert load_causal_lm(folder, attn_implementation="eager").config._attn_implementation == "eager"


def _edit_config(**values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def _edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, lambda tensors: (change(tensors), None)[1])


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _outside(folder: Path) -> Path:
    """A second copy of the weights, beside the folder."""
    return Path(shutil.copyfile(folder / "model.safetensors", folder.parent / "outside.safetensors"))


def _index(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        outside = _outside(folder)
        weight_map = dict.fromkeys(load_file(outside), name.format(outside=outside))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "model.safetensors").unlink()

    return harm


def _link(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        outside = Path(shutil.move(folder / name, folder.parent / "outside"))
        (folder / name).symlink_to(outside)

    return harm


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"holds no config\.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), r"Cannot read `.*config\.json`"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "is not a JSON object"),
    "config of nothing": (lambda folder: (folder / "config.json").write_text("{}"), "Unrecognized model"),
    "config of no causal LM": (_edit_config(model_type="t5"), "T5Config, which AutoModelForCausalLM does not load"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"holds no model\.safetensors"),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "only pickled weights",
    ),
    "truncated weights": (_truncate, r"`.*model\.safetensors` is damaged"),
    "text for weights": (lambda folder: (folder / "model.safetensors").write_text("weights"), "is damaged"),
    "other widths": (_edit_config(intermediate_size=40), r"has shape \(32, 48\), the model needs \(32, 40\)"),
    "more layers": (_edit_config(num_hidden_layers=3), "lacks 9 tensors of LlamaForCausalLM"),
    "index that climbs out": (_index("../outside.safetensors"), r"names '\.\./outside.* not a safetensors file"),
    "index that names a root": (_index("{outside}"), "which is not a safetensors file beside it"),
    "index of pickles": (_index("pytorch_model.bin"), "which is not a safetensors file beside it"),
    "index of objects": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": {}}}'),
        ),
        "names {}, which is not a safetensors file",
    ),
    "weights linked from outside": (_link("model.safetensors"), "is a link to .*outside`, outside its folder"),
    "config linked from outside": (_link("config.json"), "is a link to .*outside`, outside its folder"),
    "key that appears twice": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "model_type": "gpt2"}'),
        "'model_type' appears twice",
    ),
    "endless nesting": (lambda folder: (folder / "config.json").write_text('{"a":' * 100_000), "nested too deeply"),
    "a billion layers": (_edit_config(num_hidden_layers=10**9), "num_hidden_layers=1000000000 is too large"),
    "a billion labels": (_edit_config(num_labels=10**9), "num_labels=1000000000 is too large"),
    "a billion tokens": (_edit_config(vocab_size=10**9), r"describes a model of 32,.* parameters .* the files hold"),
    "other weights by name": (_edit_config(transformers_weights="x.safetensors"), "names other weights"),
    "an adapter in it": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"holds adapter_config\.json beside a model",
    ),
    "integers for weights": (
        _edit_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)})),
        "`model.norm.weight` holds I32, the model needs floating-point numbers",
    ),
    "a name on two lines": (
        _edit_tensors(lambda tensors: tensors.update({"a\nb": torch.ones(1)})),
        r"is damaged: 'a\\nb' is not a tensor name",
    ),
    "a tensor gone": (_edit_tensors(lambda tensors: tensors.pop("model.norm.weight")), "`model.norm.weight`"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_named_in_one_line(damage: str, folder: Path) -> None:
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_causal_lm(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_link_into_the_cache_of_the_hub_is_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1234"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load_causal_lm(snapshot)
    load_tokenizer(snapshot)


def test_tokenizer_linked_from_outside_is_neither_read_nor_exported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    export_model(sparse_model(), tmp_path / "source", tokenizer=tiny_tokenizer())
    (tmp_path / "source/chat_template.jinja").symlink_to(tmp_path / "secret")
    for use in (load_tokenizer, lambda source: export_model(source, tmp_path / "out", "dense")):
        with pytest.raises(UserError, match=r"chat_template\.jinja` is a link to .*secret`, outside its folder"):
            use(tmp_path / "source")
    assert not (tmp_path / "out").exists()


def test_shards_that_hold_the_same_tensor_are_refused(folder: Path) -> None:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name in names:
        shutil.copyfile(folder / "model.safetensors", folder / name)
    weight_map = {key: names[number % 2] for number, key in enumerate(load_file(folder / "model.safetensors"))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"-00002-of-00002\.safetensors` and `model-00001-of-.*both hold"):
        load_causal_lm(folder)


def test_pickled_weights_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(evil_pickle(marker))
    load_causal_lm(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="only pickled weights, which are not read"):
        load_causal_lm(folder)
    assert not marker.exists()


def test_code_of_a_folder_is_not_run_unasked(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "modeling_x.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    _edit_config(model_type="x", auto_map={"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"})(
        folder
    )
    for load in (load_causal_lm, load_model_config):
        with pytest.raises(UserError):
            load(folder)
    load_tokenizer(folder)
    assert not marker.exists()


def test_slorb_switch_that_says_neither_is_refused(tmp_path: Path) -> None:
    for switch in ("no", 1, {"enabled": "no"}):
        save_sparse_model(sparse_model(slorb_k=8), tmp_path, {"slorb": switch})
        with pytest.raises(UserError, match="is neither settings nor true or false"):
            load_causal_lm(tmp_path)


def test_slorb_pair_of_another_shape_is_refused(tmp_path: Path) -> None:
    source = save_training_checkpoint(sparse_model(slorb_k=8), tmp_path / "source")
    name = "model.layers.0.mlp.up_proj.slorb.S"
    change_tensors(source, lambda tensors: tensors.update({name: tensors[name][:, :-1]}))
    for read in (load_checkpoint, lambda folder: export_model(folder, tmp_path / "out", "dense")):
        with pytest.raises(UserError, match=r"SLoRB pair of `model.layers.0.mlp.up_proj` is .* does not fit a layer"):
            read(source)


def test_mask_of_other_bytes_than_0_and_1_is_refused(tmp_path: Path) -> None:
    source = save_training_checkpoint(sparse_model(), tmp_path / "source")
    header, data = read_safetensors(source / "model.safetensors")
    at = header["model.layers.0.mlp.up_proj.mask"]["data_offsets"][0]
    write_safetensors(source / "model.safetensors", header, data[:at] + b"\x06" + data[at + 1 :])
    with pytest.raises(UserError, match=r"the mask of `model.layers.0.mlp.up_proj` has values other than 0 and 1"):
        load_causal_lm(source)


def test_mask_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = save_training_checkpoint(sparse_model(), tmp_path / "source")
    name = "model.layers.0.mlp.up_proj.mask"
    change_tensors(source, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(UserError, match=r"the mask of `model.layers.0.mlp.up_proj` is"):
        load_causal_lm(source)


def test_damaged_compressed_layer_is_named(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight_meta"
    change_tensors(tmp_path / "out", lambda tensors: tensors[name].zero_())
    with pytest.raises(UserError, match=r"damaged: `model.layers.0.mlp.up_proj`: its metadata"):
        load_causal_lm(tmp_path / "out")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "~/no/such/model", "a/b/c"])
def test_path_that_does_not_exist_is_named(name: str) -> None:
    for load in (load_causal_lm, load_tokenizer, load_model_config):
        with pytest.raises(UserError, match=f"There is no folder `{name}`"):
            load(name)


def test_missing_folder_beside_others_is_not_sought_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(UserError, match=f"There is no folder `{folder.parent.name}/exported`"):
        load_causal_lm(f"{folder.parent.name}/exported")


def test_unknown_hub_model_is_one_line() -> None:
    with pytest.raises(UserError, match="Cannot load the configuration of `nobody/nothing`") as caught:
        load_causal_lm("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_file_that_is_no_gguf_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"is a file, but not a \.gguf file"):
        load_causal_lm(folder / "model.safetensors")


def test_gguf_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no file `.*model\.gguf`"):
        load_causal_lm(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"holds no file `model\.gguf`"):
        load_causal_lm(tmp_path, gguf_file="model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and then text")
    with pytest.raises(UserError, match=r"Cannot load the configuration of `.*model\.gguf`"):
        load_causal_lm(tmp_path / "model.gguf")


def test_folder_without_tokenizer_is_refused_rather_than_given_an_empty_one(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tekken.json").write_text("{}")  # Mistral's
    assert tokenizer_files(tmp_path) == {tmp_path / "tekken.json"}
    (tmp_path / "tekken.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="Cannot load the tokenizer"):
        load_tokenizer(tmp_path)
