import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.training.checkpoints import check_same_model, check_same_run, last_checkpoint, resolve_checkpoint

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sparsity_config.json")


def checkpoint(run: Path, step: int, without: str | None = None, state: str = "{}") -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        if name == without:
            continue
        if name.endswith(".json"):
            (folder / name).write_text("{}")
        elif name.endswith(".safetensors"):
            save_file({"a.weight": torch.zeros(4, 8)}, folder / name)
        else:
            torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text(state)
    return folder


def test_the_newest_complete_checkpoint_is_taken_by_step_not_by_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, 90)
    newest = checkpoint(tmp_path, 100)
    assert last_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("missing", FILES)
def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path, missing: str) -> None:
    before = checkpoint(tmp_path, 10)
    half = checkpoint(tmp_path, 20, without=missing)
    assert last_checkpoint(tmp_path) == before
    with pytest.raises(UserError, match=f"no complete training checkpoint: {missing} is missing"):
        resolve_checkpoint(tmp_path, str(half))


@pytest.mark.parametrize("cut", FILES)
def test_a_cut_file_is_named_and_its_checkpoint_passed_over(tmp_path: Path, cut: str) -> None:
    before = checkpoint(tmp_path, 10)
    damaged = checkpoint(tmp_path, 20)
    content = (damaged / cut).read_bytes()
    (damaged / cut).write_bytes(content[: len(content) // 2])
    assert last_checkpoint(tmp_path) == before
    with pytest.raises(UserError, match=rf"no complete training checkpoint: .*{cut}.? is damaged"):
        resolve_checkpoint(tmp_path, str(damaged))


def test_another_model_is_named_by_a_layer(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    check_same_model(folder, {"a": (4, 8)})
    with pytest.raises(UserError, match=r"`a` of the model has shape \(4, 16\), in .*checkpoint-10' \(4, 8\)"):
        check_same_model(folder, {"a": (4, 16)})


def test_a_cut_trainer_state_marks_a_half_written_checkpoint(tmp_path: Path) -> None:
    before = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, state='{"global_step": 2')
    assert last_checkpoint(tmp_path) == before


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing to resume"):
        resolve_checkpoint(tmp_path, True)
    with pytest.raises(UserError, match="is no folder"):
        resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))


def recorded(**sparsity: object) -> str:
    return json.dumps({"sparsity": {"pattern": "2:4", **sparsity}, "slorb": None, "layers": ["a", "b"]})


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / "sparsity_config.json").write_text(recorded(mask_interval=10))
    check_same_run(folder, SparsityConfig(), None, ["a", "b"])
    with pytest.raises(UserError, match=r"sparsity.mask_interval=20 differs from 10"):
        check_same_run(folder, SparsityConfig(mask_interval=20), None, ["a", "b"])
    with pytest.raises(UserError, match=r"slorb\.enabled=True differs from False"):
        check_same_run(folder, SparsityConfig(), SLoRBConfig(), ["a", "b"])
    with pytest.raises(UserError, match="'c' is pruned in only one"):
        check_same_run(folder, SparsityConfig(), None, ["a", "b", "c"])


def test_a_setting_the_checkpoint_does_not_know_had_its_default(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / "sparsity_config.json").write_text(recorded())
    check_same_run(folder, SparsityConfig(), None, ["a", "b"])
    with pytest.raises(UserError, match=r"sparsity.decay_ramp=0.5 differs from 0.25"):
        check_same_run(folder, SparsityConfig(decay_ramp=0.5), None, ["a", "b"])


def test_a_damaged_sparsity_config_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / "sparsity_config.json").write_text('{"sparsity": ')
    with pytest.raises(UserError, match=r"sparsity_config\.json cannot be read"):
        check_same_run(folder, SparsityConfig(), None, [])
