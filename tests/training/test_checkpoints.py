import json
from pathlib import Path

import pytest

from ast_sparse.errors import UserError
from ast_sparse.training.checkpoints import check_same_run, last_checkpoint, resolve_checkpoint

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sparsity_config.json")


def checkpoint(run: Path, step: int, without: str | None = None, state: str = "{}") -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        if name != without:
            (folder / name).write_text("{}")
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
    with pytest.raises(UserError, match=f"no complete training checkpoint: {missing} missing"):
        resolve_checkpoint(tmp_path, str(half))


def test_a_cut_trainer_state_marks_a_half_written_checkpoint(tmp_path: Path) -> None:
    before = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, state='{"global_step": 2')
    assert last_checkpoint(tmp_path) == before


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing to resume"):
        resolve_checkpoint(tmp_path, True)
    with pytest.raises(UserError, match="is no folder"):
        resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))


def config(**sparsity: object) -> dict:
    return {"sparsity": {"pattern": "2:4", "mask_interval": 10, **sparsity}, "slorb": None, "layers": ["a", "b"]}


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / "sparsity_config.json").write_text(json.dumps(config()))
    check_same_run(folder, config())
    with pytest.raises(UserError, match=r"sparsity.mask_interval=20 differs from 10"):
        check_same_run(folder, config(mask_interval=20))
    with pytest.raises(UserError, match=r"slorb\.enabled=True differs from False"):
        check_same_run(folder, {**config(), "slorb": {"enabled": True, "k": 16}})
    with pytest.raises(UserError, match="'c' is pruned in only one"):
        check_same_run(folder, {**config(), "layers": ["a", "b", "c"]})


def test_a_damaged_sparsity_config_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / "sparsity_config.json").write_text('{"sparsity": ')
    with pytest.raises(UserError, match=r"sparsity_config\.json cannot be read"):
        check_same_run(folder, config())
