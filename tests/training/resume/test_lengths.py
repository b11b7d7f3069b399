"""Resuming with a different number of steps."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ast_sparse import SLoRBConfig, SparsityConfig
from ast_sparse.training.resume.setting_classes import past_follows_length, rest_follows_length
from tests.training.resume.resumed_runs import refusal, resume, train, trainer
from tests.training.small_runs import arguments


def test_a_run_whose_steps_do_not_depend_on_its_length_may_become_longer(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        made = trainer(folder, max_steps=steps, lr_scheduler_type="constant")
        made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return made.model.state_dict()

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "short", 4)
    longer = run(tmp_path / "longer", 6, tmp_path / "short/checkpoint-2")
    assert all(torch.equal(tensor, longer[name]) for name, tensor in whole.items())


def test_another_length_is_printed_with_what_depends_on_it(root: Path, out: Path) -> None:
    for settings, line in (
        (["training.max_steps=3"], "training.max_steps 2 -> 3 ("),
        (["training.max_steps=-1", "training.num_train_epochs=0.02"], "training.max_steps 2 -> -1 ("),
    ):
        result = resume(root, out, *settings)
        assert result.exit_code == 0 and f"resume: {line}training.lr_scheduler_type=linear and" in result.stdout
        shutil.rmtree(out)
        shutil.copytree(root / "whole", out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.max_steps=1"], "training.max_steps=1 "),
        (["training.max_steps=-1", "training.num_train_epochs=0.01"], "training.num_train_epochs=0.01 "),
    ],
)
def test_a_run_cannot_end_before_the_steps_it_has_done(
    root: Path, out: Path, settings: list[str], message: str
) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    said = refusal(train(root, out, "--resume", str(out / "checkpoint-2"), *options))
    assert f"{message}ends before step 2 of" in said and "Resume from an earlier checkpoint, or raise" in said


@pytest.mark.parametrize(
    ("args", "sparsity", "expected"),
    [
        ({}, {}, ["training.lr_scheduler_type=linear", "sparsity.decay_schedule=annealed"]),
        ({"lr_scheduler_type": "constant"}, {}, ["sparsity.decay_schedule=annealed"]),
        ({"lr_scheduler_type": "constant"}, {"decay_schedule": "static"}, []),
        ({"lr_scheduler_type": "constant"}, {"mask_decay": 0.0}, []),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, {"decay_ramp": 0.0}, []),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, {"decay_ramp": 0.0},
            ["training.warmup_steps=0.1"],
        ),
    ],
)  # fmt: skip
def test_what_depends_on_the_number_of_steps(
    tmp_path: Path, args: dict[str, Any], sparsity: dict[str, Any], expected: list[str]
) -> None:
    config = SparsityConfig(**sparsity)
    assert rest_follows_length(arguments(tmp_path, **args), config) == expected
    assert past_follows_length(config, SLoRBConfig(start=0.0)) is None
    assert past_follows_length(config, SLoRBConfig(start=0.5)) == "slorb.start=0.5"
    assert past_follows_length(SparsityConfig(schedule="gmp"), None) == "sparsity.schedule=gmp"
