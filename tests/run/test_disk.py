"""What a run writes to the disk, and what is said if there is no room for it."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ast_sparse.errors import UserError
from ast_sparse.run.disk import Disk
from ast_sparse.run.output import replaced_bytes

GIB = 2**30
WEIGHTS, PRUNED = 134_515_008, 106_168_320  # of SmolLM2-135M


def disk(start: int = 0, moments: str = "float32", steps: int | None = 60, **args: Any) -> Disk:
    config: Any = SimpleNamespace(optimizer=SimpleNamespace(moments=moments))
    defaults = dict(
        save_strategy="steps", save_steps=20, save_total_limit=None, save_only_model=False,
        metric_for_best_model=None,
    )  # fmt: skip
    plan: Any = SimpleNamespace(
        sparsity=SimpleNamespace(total_parameters=WEIGHTS, pruned_parameters=PRUNED), steps=steps, start_bytes=start
    )
    arguments: Any = SimpleNamespace(**{**defaults, **args})
    return Disk.of(config, arguments, plan)


def test_a_checkpoint_has_the_size_of_a_real_one() -> None:
    real = 657_576_816 + 1_076_341_963  # model.safetensors and optimizer.pt of a run
    assert disk().checkpoint == pytest.approx(real, rel=1e-3)
    assert disk().model == 4 * WEIGHTS and disk(4 * PRUNED).model == 4 * WEIGHTS + 4 * PRUNED
    assert disk().checkpoint - disk(moments="8bit").checkpoint == 6 * PRUNED
    assert disk().checkpoint - disk(save_only_model=True, moments="8bit").checkpoint == 8 * WEIGHTS


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (dict(), 3),
        (dict(steps=61), 4),
        (dict(save_total_limit=1), 2),  # the new one is written before the old one goes
        (dict(save_total_limit=1, metric_for_best_model="loss"), 3),  # the best one stays beside them
        (dict(save_total_limit=2, metric_for_best_model="loss"), 3),
        (dict(save_total_limit=5), 3),
        (dict(save_steps=0.5), 2),
        (dict(save_strategy="epoch"), 1),  # how many epochs there are is not known
        (dict(save_strategy="epoch", save_total_limit=2), 3),
        (dict(steps=None), 1),
        (dict(save_strategy="no"), 0),
    ],
)
def test_checkpoints_that_are_there_at_the_same_time(settings: dict[str, Any], count: int) -> None:
    found = disk(**settings)
    assert found.checkpoints == count and found.needed == found.model + count * found.checkpoint


def test_a_new_run_gets_the_room_of_what_it_replaces(tmp_path: Path) -> None:
    for name, size in {"start/block.safetensors": 3, "checkpoint-2/optimizer.pt": 50, "model.safetensors": 700}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert replaced_bytes(tmp_path, overwrite=False) == 3
    assert replaced_bytes(tmp_path, overwrite=True) == 753
    assert replaced_bytes(tmp_path / "none", overwrite=True) == 0


def test_a_run_without_room_is_refused_and_one_with_too_little_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, folder = disk(), tmp_path / "not" / "there"

    def check(free: float, replaced: int = 0) -> str:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free) if path == tmp_path else None)
        return found.check(folder, replaced)

    line = "disk: about 5.3 GiB for the model and 3 checkpoints of 1.6 GiB"
    assert found.line() == check(found.needed) == line
    least = found.model + found.checkpoint
    assert check(least, GIB) == f"{line}, but 3.1 GiB are free: make room, or lower training.save_total_limit"
    with pytest.raises(UserError, match=r"output_dir='.*there' has 2\.1 GiB free, and the run needs about 5\.3 GiB"):
        check(least - 1)
    assert disk(save_strategy="no").line() == "disk: about 0.5 GiB for the model"
    assert disk(steps=1).line().endswith("for the model and a checkpoint of 1.6 GiB")
