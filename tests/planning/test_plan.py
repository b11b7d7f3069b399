"""What a plan says of settings before anything is loaded."""

from pathlib import Path

import pytest

from ast_sparse.config import BasisConfig, DataConfig, ModelConfig, RunConfig, SLoRBConfig, SparsityConfig
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


@pytest.mark.parametrize(("init", "basis", "parameters"), [
    ("magnitude", None, 0), ("sparsegpt", None, 15_488),  # two blocks: 15,360 masked weights and 128 of the norms
    ("sparsegpt", BasisConfig(), 19_616), ("magnitude", BasisConfig(rotation_steps=2), 19_616 + 4_096),  # untied head
])  # fmt: skip
def test_a_start_has_the_blocks_and_after_a_change_of_basis_the_whole_model(
    tmp_path: Path, init: str, basis: BasisConfig | None, parameters: int
) -> None:
    save_tiny_model(tmp_path / "model")
    config = RunConfig(
        model=ModelConfig(name_or_path=str(tmp_path / "model")),
        data=DataConfig(train=("text.txt",), block_size=16),
        sparsity=SparsityConfig(init=init),  # type: ignore[arg-type]
        basis=basis,
    )
    plan = make_plan(config, arguments(tmp_path))
    assert plan.start_bytes == (4 * parameters + 15_360 // 8 if parameters else 0)
    assert any("about 0.0 GiB in start/" in line for line in plan.lines()) is (parameters > 0)
