"""ast-train --dry-run: the plan, before anything is paid."""

from pathlib import Path

from click.testing import CliRunner

from ast_sparse.cli.train import main
from tests.models import save_tiny_model

CONFIG = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/text.txt, block_size: 32}}
training: {{max_steps: 10, per_device_train_batch_size: 3, gradient_accumulation_steps: 2, bf16: true}}
"""


def test_dry_run_prints_the_plan_without_an_accelerator_and_writes_nothing(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("two of four")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "out"), "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "2:4 on 14 layers: 15,360 of 19,616 parameters (78.3%)" in result.stdout
    assert "skipped  lm_head  (1): outside the decoder blocks" in result.stdout
    assert "tokens: 10 steps x 192 tokens a step = 1,920" in result.stdout
    assert "teacher" in result.stdout and "total" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before
