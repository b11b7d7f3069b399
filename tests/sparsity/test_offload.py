"""Weights in host memory: the same steps, on two devices with fake copies that arrive late."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from ast_sparse import OptimizerConfig, SLoRBConfig, SparseTrainer, SparsityConfig, UserError
from ast_sparse.optim import SparseAdamW
from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masks import Pattern, nm_mask
from ast_sparse.sparsity.model import masks_by_parameter, refresh_masks, sparse_layers
from ast_sparse.sparsity.offload import OffloadedAdamW, Wait
from tests.models import tiny_model
from tests.training.small_runs import trainer, weights

OFFLOAD = OptimizerConfig(offload=True)
OPTIONS: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, mask_decay=1e-2)


class Late:
    """Copies that happen only when someone waits for them, or at the end; until then the target has NaN."""

    def __init__(self, device: torch.device) -> None:
        self.pending: list[Callable[[], None]] = []

    def buffer(self, size: int) -> Tensor:
        return torch.full((size,), 255, dtype=torch.uint8)

    def begin(self) -> None: ...

    def fetch(self, target: Tensor, source: Tensor) -> Wait:
        target.fill_(torch.nan)
        return self.send(target, source)

    def send(self, target: Tensor, source: Tensor) -> Wait:
        done = []

        def copy_once() -> None:
            if not done:
                done.append(target.copy_(source))

        self.pending.append(copy_once)
        return copy_once

    def end(self) -> None:
        for copy_once in self.pending:
            copy_once()
        self.pending = []


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    for layer in (model[0], model[1]):
        make_sparse(layer, nm_mask(layer.weight.detach().abs()), Pattern(2, 4))
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    masked = [layer.weight for layer in sparse_layers(model).values()]
    others = [p for p in model.parameters() if p.requires_grad and all(p is not each for each in masked)]
    return [{"params": masked, "is_masked": True}, {"params": others}]


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_late_copies_change_no_step_and_a_float64_twin_agrees(half: torch.dtype | None) -> None:
    """Gradients come from the device's weights; given those, host weights follow AdamW with decay in float64."""
    model = network()
    optimizer = OffloadedAdamW(groups(model), half=half, **OPTIONS)
    optimizer.copies = Late
    optimizer.bind_masks(masks_by_parameter(model))
    twin_weights = copy.deepcopy(model).double()
    twin = SparseAdamW(groups(twin_weights), **OPTIONS)
    twin.bind_masks(masks_by_parameter(twin_weights))
    optimizer.begin_offload(model)
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=half is not None):
            model(torch.randn(5, 16)).square().sum().backward()
        for parameter, other in zip(model.parameters(), twin_weights.parameters(), strict=True):
            if parameter.grad is not None:
                assert parameter.grad.dtype == torch.float32
                other.grad = parameter.grad.double()
        optimizer.step()
        twin.step()
        optimizer.zero_grad()
        with optimizer.true_weights():
            refresh_masks(model)
        refresh_masks(twin_weights)
        for name, layer in sparse_layers(model).items():
            other = twin_weights.get_submodule(name)
            assert torch.equal(layer.mask, other.mask)
            assert layer.weight.dtype == (half or torch.float32)
            with optimizer.true_weights():
                assert layer.weight.dtype == torch.float32
                torch.testing.assert_close(layer.weight.double(), other.weight, rtol=1e-4, atol=1e-6)
                kept = torch.where(layer.mask, layer.weight, 0)
            assert torch.equal(layer.weight, kept.to(half or torch.float32))  # the device has the masked weight
    optimizer.end_offload()
    for parameter, other in zip(model.parameters(), twin_weights.parameters(), strict=True):
        assert parameter.dtype in (torch.float32, torch.bool, torch.uint8)
        torch.testing.assert_close(parameter.double(), other.double(), rtol=1e-4, atol=1e-6)


def test_outside_autocast_an_offloaded_layer_computes_in_the_dtype_of_its_input() -> None:
    model = network()
    optimizer = OffloadedAdamW(groups(model), half=torch.bfloat16, **OPTIONS)
    optimizer.begin_offload(model)
    assert model(torch.randn(2, 16)).dtype == torch.float32


def test_a_sparse_weight_that_is_not_trained_is_masked_on_the_device_too() -> None:
    model, inputs = network(), torch.randn(5, 16)
    frozen = model[1]
    frozen.weight.requires_grad_(False)
    before, expected = frozen.weight.clone(), model(inputs)
    trained = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups(model)]
    optimizer = OffloadedAdamW(trained, **OPTIONS)
    optimizer.bind_masks(masks_by_parameter(model))
    optimizer.begin_offload(model)
    assert torch.equal(model(inputs), expected)
    with optimizer.true_weights():
        assert torch.equal(frozen.weight, before)
        frozen.mask.logical_not_()
    assert torch.equal(frozen.weight, torch.where(frozen.mask, before, 0))
    model(inputs).sum().backward()
    optimizer.step()
    optimizer.state_dict()  # has no entry for it
    optimizer.end_offload()
    assert torch.equal(frozen.weight, before)


class Looks(TrainerCallback):
    """What a run with offload holds while it trains."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.zeros = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in sparse_layers(kwargs["model"]).values():
            self.dtypes.add(layer.weight.dtype)
            self.zeros &= bool((layer.weight[~layer.mask] == 0).all())


def run(folder: Path, offload: bool, model: Any = None, until: int | None = None, **kwargs: Any) -> SparseTrainer:
    settings = dict(max_steps=20, gradient_accumulation_steps=2, weight_decay=0.1, max_grad_norm=0.5)
    args = {**settings, **kwargs.pop("args", {})}
    made = trainer(
        folder, model, optimizer_config=OFFLOAD if offload else None, slorb_config=SLoRBConfig(k=4), args=args, **kwargs
    )
    if until is not None:
        made.add_callback(StopsAt(until))
    return made


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step
        control.should_save = state.global_step == self.step


def record(made: SparseTrainer) -> list[dict[str, float]]:
    keys = ("loss", "grad_norm", "flip_rate", "initial_flip_rate")
    return [{key: row[key] for key in keys if key in row} for row in made.state.log_history]


def assert_same_end(ours: SparseTrainer, plain: SparseTrainer) -> None:
    for (name, tensor), other in zip(weights(ours.model).items(), weights(plain.model).values(), strict=True):
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name
    states = [made.optimizer.optimizer.state_dict()["state"] for made in (ours, plain)]
    for index, state in states[1].items():
        assert all(torch.equal(states[0][index][key], value) for key, value in state.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SparseTrainer:
    """A run in float32 without offload."""
    made = run(tmp_path_factory.mktemp("whole"), False)
    made.train()
    return made


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
def test_a_run_with_offload_equals_one_without_to_the_bit(tmp_path: Path, half: bool, whole: SparseTrainer) -> None:
    """Losses, norms before clipping, flip rates, weights, masks and moments, with accumulation and SLoRB."""
    looks = Looks()
    plain = run(tmp_path, False, args=dict(bf16=True)) if half else whole
    if half:
        plain.train()
    ours = run(tmp_path / "True", True, args=dict(bf16=half), callbacks=[looks])
    ours.train()
    assert looks.dtypes == {torch.bfloat16 if half else torch.float32} and looks.zeros
    assert record(ours) == record(plain) and len(record(plain)) > 20
    assert_same_end(ours, plain)
    ours.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "True")
    assert torch.equal(saved.lm_head.weight, ours.student.lm_head.weight)
    assert saved.dtype == torch.float32


@pytest.mark.parametrize(
    "sparsity",
    [
        SparsityConfig(mask_interval=0),
        SparsityConfig(schedule="gmp", mask_interval=2, mask_decay=0),
        SparsityConfig(mask_interval=2, criterion="wanda"),
    ],
    ids=["fixed", "gmp", "wanda"],
)
def test_other_masks_are_the_same_with_offload(tmp_path: Path, sparsity: SparsityConfig) -> None:
    made = [
        trainer(tmp_path, tiny_model("gpt2"), sparsity, optimizer_config=OptimizerConfig(offload=offload))
        for offload in (False, True)
    ]
    for each in made:
        each.train()
    assert record(made[1]) == record(made[0])
    assert_same_end(made[1], made[0])


def test_offload_may_come_and_go_at_a_resume(
    tmp_path: Path, whole: SparseTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, False, until=5).train()
    run(tmp_path, True, until=11).train(resume_from_checkpoint=True)
    assert "resume: optimizer.offload False -> True" in capsys.readouterr().out
    resumed = run(tmp_path, False)
    resumed.train(resume_from_checkpoint=True)
    assert "resume: optimizer.offload True -> False" in capsys.readouterr().out
    assert_same_end(resumed, whole)


def test_what_is_saved_and_exported_during_a_run_are_the_whole_weights(tmp_path: Path) -> None:
    class Exports(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                for made in both:
                    if made.model is kwargs["model"]:
                        made.save_model(f"{args.output_dir}/saved")

    both = [run(tmp_path / str(o), o, args=dict(max_steps=3, bf16=True), callbacks=[Exports()]) for o in (False, True)]
    for made in both:
        made.train()
    saved = [AutoModelForCausalLM.from_pretrained(tmp_path / str(o) / "saved").state_dict() for o in (False, True)]
    assert all(torch.equal(saved[1][name], tensor) for name, tensor in saved[0].items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"args": {"torch_compile": True}}, r"optimizer.offload=True does not work with training.torch_compile=True"),
        (
            {"optimizers": (SparseAdamW([nn.Parameter(torch.ones(1))]), None)},
            r"optimizer.offload=True would be ignored",
        ),
    ],
)
def test_offload_is_refused_where_it_does_not_work(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, optimizer_config=OFFLOAD, **kwargs)
