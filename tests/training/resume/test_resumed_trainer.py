"""A SparseTrainer that is resumed in Python is compared with its checkpoint, as ast-train is."""

from pathlib import Path
from typing import Any

import pytest

from ast_sparse import DistillationConfig, SparseAdamW, UserError
from tests.models import tiny_model, tiny_tokenizer
from tests.training.resume.resumed_runs import trainer
from tests.training.small_runs import blocks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("notebook")
    trainer(folder).train()
    return str(folder / "checkpoint-2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-4}, r"training\.learning_rate=0\.0001 differs from 0\.003"),
        ({"weight_decay": 0.1}, r"training\.weight_decay=0\.1 differs from 0 in"),
        ({"per_device_train_batch_size": 2}, r"= 2 sequences a step differs from 4 x 1 x 1 = 4"),
        ({"distillation_config": DistillationConfig(alpha=0.6)}, r"distillation\.alpha=0\.6 differs from 0\.5"),
        ({"distillation_config": None}, r"distillation=null differs from"),
        ({"train_dataset": blocks(seed=1)}, r"train_dataset is not what .*: the tokens differ"),
        ({"train_dataset": blocks(size=8)}, r"train_dataset is not what .*: the tokens differ"),
        ({"eval_dataset": blocks(count=4)}, r"eval_dataset is not what .*: the tokens differ"),
        ({"processing_class": tiny_tokenizer()}, r"processing_class is not what"),
        ({"teacher_model": tiny_model(seed=3)}, r"teacher_model is not what .*: the weights differ"),
        ({"model": tiny_model(seed=3)}, r"model is not what .*: the weights differ"),
    ],
)
def test_a_run_in_a_notebook_is_compared_too(tmp_path: Path, checkpoint: str, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **change).train(resume_from_checkpoint=checkpoint)


def test_a_run_in_a_notebook_prints_what_may_change(
    tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, logging_steps=2).train(resume_from_checkpoint=checkpoint)
    assert "resume: training.logging_steps 1 -> 2\n" in capsys.readouterr().out


def test_an_optimizer_built_by_hand_is_compared(tmp_path: Path) -> None:
    def run(folder: Path, rate: float, resumed: str | None = None) -> None:
        made = trainer(folder)
        made.optimizer = SparseAdamW([{"params": list(made.model.parameters())}], lr=rate)
        made.train(resume_from_checkpoint=resumed)

    run(tmp_path / "a", 1e-3)
    checkpoint = str(tmp_path / "a/checkpoint-2")
    run(tmp_path / "b", 1e-3, checkpoint)
    with pytest.raises(UserError, match=r"optimizer\.lr=\[0\.01\] differs from \[0\.001\]"):
        run(tmp_path / "c", 1e-2, checkpoint)
