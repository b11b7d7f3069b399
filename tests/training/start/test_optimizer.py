"""What the settings of a run say about its updates reaches the optimizer."""

from pathlib import Path

import pytest

from ast_sparse.config import OptimizerConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.model import sparsify_model
from ast_sparse.training.start.optimizer import sparse_adamw
from tests.models import tiny_model
from tests.training.small_runs import arguments, trainer


@pytest.mark.parametrize("where", [OptimizerConfig(), OptimizerConfig(offload=True), OptimizerConfig(moments="8bit")])
def test_rates_betas_eps_and_the_kind_of_decay_are_those_of_the_settings(
    tmp_path: Path, where: OptimizerConfig
) -> None:
    model, sparsity = tiny_model(), SparsityConfig(decay_norm="l1", decay_placement="weight")
    sparsify_model(model, sparsity)
    args = arguments(tmp_path, learning_rate=2e-3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    keys = ("lr", "betas", "eps", "decay_norm", "decay_placement")
    groups = sparse_adamw(model, (), args, sparsity, where).param_groups
    assert {tuple(group[key] for key in keys) for group in groups} == {(2e-3, (0.8, 0.95), 1e-6, "l1", "weight")}


def test_a_run_gives_its_settings_to_its_optimizer(tmp_path: Path) -> None:
    args = dict(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    run = trainer(tmp_path, sparsity=SparsityConfig(decay_norm="l1"), args=args)
    groups = run.create_optimizer().param_groups
    assert {(group["betas"], group["eps"], group["decay_norm"]) for group in groups} == {((0.8, 0.95), 1e-6, "l1")}


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_model().requires_grad_(False))
    with pytest.raises(UserError, match=r"All parameters of the model are frozen .* `model.requires_grad_\(True\)`"):
        run.create_optimizer()
