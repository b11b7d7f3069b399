import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import generated_text, save_tiny_model
from tests.training.resume.resumed_runs import train


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("same_run")
    save_tiny_model(root / "model")
    save_tiny_model(root / "other_model", seed=1)
    for name, seed in (("text", 0), ("other", 5)):
        (root / f"{name}.txt").write_text(generated_text(150, seed=seed))
    result = train(root, root / "whole")
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run; its weights must not change."""
    shutil.copytree(root / "whole", tmp_path / "out")
    yield tmp_path / "out"
