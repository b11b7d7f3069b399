"""Saving sparse models as ordinary checkpoints, and finished folders."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ast_sparse.errors import UserError
from ast_sparse.storage.files import read_json
from ast_sparse.storage.save import check_out_dir, finished_folder, save_sparse_model, split_state_dict
from tests.export.sparse_models import masked_state, sparse_model, token_ids
from tests.models import FAMILIES, tiny_model

CONFIG = {"pattern": "2:4"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_model_is_an_ordinary_checkpoint_with_masked_weights(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = sparse_model(family).to(dtype)
    save_sparse_model(model, tmp_path, CONFIG)
    expected = masked_state(model, dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) <= set(expected)  # tied weights once
    assert all(value.dtype == dtype and torch.equal(value, expected[name]) for name, value in stored.items())
    assert not any((value == 0).logical_and(value.signbit()).any() for name, value in stored.items() if "proj" in name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    if dtype == torch.float32:  # `.to(bfloat16)` rounds the rotary frequencies as well, loading does not
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    assert read_json(tmp_path / "sparsity_config.json") == CONFIG
    assert not (tmp_path / "slorb").exists()


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = sparse_model(slorb_k=8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    save_sparse_model(model, tmp_path, CONFIG)
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_gathered_state_dict_is_saved_instead_of_the_own_one(tmp_path: Path) -> None:
    model = sparse_model("llama")
    gathered = {name: value.clone() for name, value in sparse_model("llama", seed=1).state_dict().items()}
    save_sparse_model(model, tmp_path, CONFIG, state_dict=gathered)
    expected = masked_state(sparse_model("llama", seed=1), torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied, though the gathered copies share no storage
    assert all(torch.equal(value, expected[name]) for name, value in stored.items())


def test_adapter_of_an_earlier_run_does_not_stay(tmp_path: Path) -> None:
    save_sparse_model(sparse_model(slorb_k=8), tmp_path, CONFIG)
    assert (tmp_path / "slorb" / "adapter_model.safetensors").is_file()
    save_sparse_model(sparse_model(), tmp_path, CONFIG)
    assert not (tmp_path / "slorb").exists()


def test_foreign_buffer_called_mask_is_not_ours() -> None:
    state = {"block.weight": torch.ones(4, 4), "block.mask": torch.ones(4, 4).bool()}
    weights, masks, pairs = split_state_dict(state)
    assert weights.keys() == state.keys() and not masks and not pairs


def test_plain_model_splits_into_itself() -> None:
    state = tiny_model().state_dict()
    weights, masks, pairs = split_state_dict(state)
    assert weights.keys() == state.keys() and not masks and not pairs


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_interrupted_folder_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), finished_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("{}")
        raise error
    assert not list(tmp_path.iterdir())


def test_interrupted_overwrite_leaves_the_old_folder(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(RuntimeError), finished_folder(old) as partial:
        (partial / "config.json").write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (old / "config.json").read_text() == "old"
    with finished_folder(old) as partial:
        (partial / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (old / "config.json").read_text() == "new"


def test_failure_to_write_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left"), finished_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")


def test_output_folder_must_be_free(tmp_path: Path) -> None:
    full, model, file = tmp_path / "full", tmp_path / "model", tmp_path / "file"
    for folder, name in ((full, "thesis.txt"), (model, "config.json")):
        folder.mkdir()
        (folder / name).write_text("")
    file.write_text("")
    check_out_dir(tmp_path / "new", None, overwrite=False)
    check_out_dir(model, None, overwrite=True)
    with pytest.raises(UserError, match="is not empty"):
        check_out_dir(model, None, overwrite=False)
    with pytest.raises(UserError, match="something other than a model"):
        check_out_dir(full, None, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        check_out_dir(file, None, overwrite=True)
    for inside in (model, model / "checkpoint-3"):
        with pytest.raises(UserError, match="holds the checkpoint that is being exported"):
            check_out_dir(model, inside, overwrite=True)
    (tmp_path / "mounted").symlink_to(tmp_path)  # a path that is not resolved stands for a mount
    for inside in (model, model / "checkpoint-1"):
        inside.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"mounted/.*holds the checkpoint that is being exported"):
            check_out_dir(tmp_path / "mounted" / model.name, inside, overwrite=True)


def test_what_would_fail_after_hours_of_work_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, file = tmp_path / "mine", tmp_path / "file"
    out.mkdir()
    file.write_text("")
    with pytest.raises(UserError, match=r"`.*file/new` cannot be written: it is made in `.*file`"):
        check_out_dir(file / "new", None, overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: path == out)
        with pytest.raises(UserError, match=r"`.*mine` is a mount point, .* Name a folder inside it"):
            check_out_dir(out, None, overwrite=False)
        check_out_dir(out / "new", None, overwrite=False)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # a folder of one's own in a foreign one
    for name in ("mine", "new", "new/deeper"):
        with pytest.raises(UserError, match=rf"`.*{name}` cannot be written: it is made in `{tmp_path}`"):
            check_out_dir(tmp_path / name, None, overwrite=True)
    check_out_dir(out / "new", None, overwrite=False)
