"""What an evaluation, or another trainer, leaves on a model changes neither training nor its dtype."""

from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.training.fsdp import load_weights
from ast_sparse.training.start.preparation import forget_preparation, prepare_again
from tests.models import tiny_model
from tests.training.small_runs import arguments, blocks, trainer, weights

TRACES = {"_is_accelerate_prepared", "_original_forward", "forward"}


def evaluated_in_bf16(folder: Path, model: Any) -> Any:
    """By transformers' own trainer."""
    AcceleratorState._reset_state()
    rows = blocks(2).map(lambda row: {"labels": row["input_ids"]})
    Trainer(model, arguments(folder, bf16=True), eval_dataset=rows).evaluate()
    AcceleratorState._reset_state()
    return model


def test_a_model_is_as_it_was_before_it_was_prepared(tmp_path: Path) -> None:
    model: Any = tiny_model("llama")
    ids = torch.tensor([blocks(1)["input_ids"][0]])
    plain = model.eval()(input_ids=ids).logits
    evaluated_in_bf16(tmp_path, model)
    assert set(model.__dict__) >= TRACES and not torch.equal(model(input_ids=ids).logits, plain)
    assert forget_preparation(model)
    assert not TRACES & set(model.__dict__) and torch.equal(model(input_ids=ids).logits, plain)
    assert not forget_preparation(model)


def around(forward: Any) -> Any:
    @wraps(forward)
    def own(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return own


def test_a_forward_pass_that_is_not_accelerates_stays(tmp_path: Path) -> None:
    below: Any = tiny_model("llama")
    below.forward = mine = around(below.forward)
    assert forget_preparation(evaluated_in_bf16(tmp_path, below)) and below.forward is mine
    above = evaluated_in_bf16(tmp_path, tiny_model("llama"))
    above.forward = mine = around(above.forward)
    assert forget_preparation(above) and above.forward is mine


def test_a_model_that_another_trainer_evaluated_in_bf16_computes_in_float32(tmp_path: Path) -> None:
    losses = [
        trainer(tmp_path, model, eval_dataset=blocks(2)).evaluate()["eval_loss"]
        for model in (tiny_model("llama"), evaluated_in_bf16(tmp_path, tiny_model("llama")))
    ]
    assert losses[0] == losses[1]


def test_in_bf16_an_evaluation_before_training_changes_nothing(tmp_path: Path) -> None:
    found = []
    for evaluates_first in (False, True):
        AcceleratorState._reset_state()
        run = trainer(tmp_path, eval_dataset=blocks(2), args={"bf16": True, "max_steps": 2})
        if evaluates_first:
            run.evaluate()
        run.train()
        assert run.model.__dict__["_original_forward"] == MethodType(type(run.model).forward, run.model)  # once
        found.append(weights(run.student))
    AcceleratorState._reset_state()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def test_training_prepares_a_model_again_unless_ddp_has_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=blocks(2))
    run.evaluate()
    assert run.accelerator._models == [run.model]
    run.model_wrapped = torch.compile(run.model, backend="eager")  # as an evaluation with torch_compile leaves it
    prepare_again(run)
    assert run.model_wrapped is run.model and not TRACES & set(run.model.__dict__) and not run.accelerator._models
    run.evaluate()
    ddp = DistributedDataParallel.__new__(DistributedDataParallel)  # without processes
    torch.nn.Module.__init__(ddp)
    for outer in (ddp, torch.compile(ddp, backend="eager")):
        run.model_wrapped = outer
        prepare_again(run)
        assert run.model_wrapped is outer and "_is_accelerate_prepared" in run.model.__dict__


def test_a_model_inside_torch_compile_has_the_names_of_its_checkpoints(tmp_path: Path) -> None:
    """As accelerate leaves the student of a sharded run that is compiled."""
    run = trainer(tmp_path)
    model, expected = run.student, weights(run.student)
    model.save_pretrained(tmp_path, save_original_format=False)
    run.model = compiled = torch.compile(model, backend="eager")
    assert run.student is model
    assert sparse_layers(compiled).keys() == run.sparsity_report.pruned.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(tmp_path, compiled)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(model).items())
