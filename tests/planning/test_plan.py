"""What a plan says of settings before anything is loaded."""

from pathlib import Path

import pytest

from ast_sparse.config import BasisConfig, DataConfig, ModelConfig, RunConfig, SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.planning.budget import Budget
from ast_sparse.planning.plan import Hardware, make_plan
from ast_sparse.planning.setup import Setup
from tests.families import family_config, family_model
from tests.models import save_tiny_model
from tests.training.small_runs import arguments, trainer


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


def test_a_model_that_cannot_recompute_its_blocks_is_not_asked_to(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    family_config("openai-gpt").save_pretrained(tmp_path / "model")
    config = RunConfig(
        model=ModelConfig(name_or_path=str(tmp_path / "model")), data=DataConfig(train=("text.txt",), block_size=16)
    )
    args = arguments(tmp_path)
    plan = make_plan(config, args, with_memory=True)
    setup = Setup.of_run(config, args, plan.model_config, 1)
    with pytest.raises(UserError, match="No settings make it fit"):
        Budget(plan, setup, Hardware(device_memory=1e-6)).check()
    reason = r"gradient_checkpointing=True: OpenAIGPTLMHeadModel does not support it\. Set it to false"
    with pytest.raises(UserError, match=reason):
        make_plan(config, arguments(tmp_path, gradient_checkpointing=True))
    with pytest.raises(UserError, match=reason):
        trainer(tmp_path, family_model("openai-gpt"), args={"gradient_checkpointing": True})
