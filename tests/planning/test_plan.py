"""What a plan says of settings before anything is loaded."""

from pathlib import Path

import pytest

from ast_sparse.config import DataConfig, ModelConfig, RunConfig, SLoRBConfig, SparsityConfig
from ast_sparse.planning.plan import make_plan
from tests.models import save_tiny_model
from tests.training.small_runs import arguments


@pytest.mark.parametrize(("init", "slorb", "said"), [
    ("sparsegpt", "mean", True), ("sparsegpt", "zero", True), ("sparsegpt", "svd", False), ("magnitude", "mean", False),
])  # fmt: skip
def test_a_better_start_of_slorb_is_named(tmp_path: Path, init: str, slorb: str, said: bool) -> None:
    save_tiny_model(tmp_path / "model")
    config = RunConfig(
        model=ModelConfig(name_or_path=str(tmp_path / "model")),
        data=DataConfig(train=("text.txt",), block_size=16),
        sparsity=SparsityConfig(init=init),  # type: ignore[arg-type]
        slorb=SLoRBConfig(k=8, init=slorb),  # type: ignore[arg-type]
    )
    lines = make_plan(config, arguments(tmp_path)).lines()
    assert any("slorb.init=svd starts closer" in line for line in lines) is said
