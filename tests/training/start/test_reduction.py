"""DDP searches for parameters without a gradient only where there may be some; settings for accumulation stay."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from ast_sparse import SLoRBConfig, SparsityConfig
from ast_sparse.sparsity.model import sparsify_model
from ast_sparse.training.start.reduction import may_leave_unused, prepare_ddp
from tests.models import tiny_model
from tests.training.small_runs import trainer


def test_every_parameter_of_a_sparse_model_with_slorb_gets_a_gradient() -> None:
    for family in ("llama", "opt", "gpt2"):
        model = tiny_model(family)
        sparsify_model(model, SparsityConfig(), SLoRBConfig(k=16, start=0.5))  # S is zero
        assert not may_leave_unused(model), family
        assert model.training is tiny_model(family).training


def beside(model: Any) -> None:
    model.model.layers[0].unread = nn.Parameter(torch.zeros(3))


def experts(model: Any) -> None:
    model.model.layers[0].mlp.experts = nn.ModuleList([model.model.layers[0].mlp.up_proj])


def dropped(model: Any) -> None:
    model.config.layerdrop = 0.1


@pytest.mark.parametrize("change", [beside, experts, dropped])
def test_a_parameter_outside_the_logits_single_experts_and_dropped_layers_may_get_none(change: Any) -> None:
    model = tiny_model("llama")
    change(model)
    assert may_leave_unused(model)


@pytest.mark.parametrize(("given", "searches"), [(None, False), (True, True), (False, False)])
def test_the_setting_of_the_user_decides(given: bool | None, searches: bool) -> None:
    handler = DistributedDataParallelKwargs(find_unused_parameters=given is not False)
    accelerator: Any = SimpleNamespace(ddp_handler=handler, num_processes=2)
    args: Any = SimpleNamespace(ddp_find_unused_parameters=given)
    prepare_ddp(accelerator, tiny_model("llama"), args)
    assert (handler.find_unused_parameters, handler.gradient_as_bucket_view) == (searches, True)


def test_a_trainer_leaves_the_settings_for_accumulation_as_they_are(tmp_path: Path) -> None:
    args = {"gradient_accumulation_steps": 2}
    given = {"sync_each_batch": True}
    run = trainer(tmp_path, args={**args, "accelerator_config": {"gradient_accumulation_kwargs": given}})
    assert run.args.accelerator_config.gradient_accumulation_kwargs == given == {"sync_each_batch": True}
    assert run.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] is True
    with_number = {"gradient_accumulation_kwargs": {"num_steps": 1}}  # written by a Trainer of transformers
    assert trainer(tmp_path, args={**args, "accelerator_config": with_number}).args.gradient_accumulation_steps == 2
