"""Whether a run recomputes to take less memory."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ast_sparse import SparsityConfig
from ast_sparse.planning.budget import USABLE
from ast_sparse.planning.memory import Memory
from ast_sparse.planning.plan import Hardware
from ast_sparse.planning.setup import Setup
from ast_sparse.planning.sizes import Term
from ast_sparse.run import memory_choices
from ast_sparse.run.memory_choices import choose_fast_forward, decide_by_memory, needs_memory_plan

SETUP = Setup(
    batch_size=1, eval_batch_size=0, gradient_accumulation_steps=1, block_size=8, dtype=torch.bfloat16,
    gradient_checkpointing=False,
)  # fmt: skip
GIB = 2**30


def config(setting: Any, **training: Any) -> Any:
    return SimpleNamespace(sparsity=SparsityConfig(fast_forward=setting, masked_weights="kept"), training=training)


@dataclass
class Settings:
    sparsity: SparsityConfig
    training: dict[str, Any] = field(default_factory=dict)


def plan(without: float, has_memory: bool = True) -> Any:
    """10 GiB, and `without` if nothing is recomputed."""

    def memory(setup: Setup) -> Memory:
        return Memory({"all": Term(int(GIB * (10 if setup.fast_forward else without)))}, "step")

    return SimpleNamespace(memory=memory if has_memory else None)


@pytest.mark.parametrize(
    ("given", "without", "setup", "is_on", "why"),
    [
        ("auto", 9.0, SETUP, False,
         "off (sparsity.fast_forward=auto: the run fits without recomputation, 9.0 of 9.2 GiB)"),
        ("auto", 9.5, SETUP, True,
         "on (sparsity.fast_forward=auto: without recomputation the run needs 9.5 GiB, and 9.2 can be used)"),
        ("auto", 99.0, replace(SETUP, on_cpu=True), True, "on (sparsity.fast_forward=auto: faster on a CPU)"),
        ("auto", 99.0, replace(SETUP, gradient_checkpointing=True), False,
         "off (sparsity.fast_forward=auto: whole blocks are recomputed)"),
        ("on", 9.0, SETUP, True, "on (sparsity.fast_forward)"),
        ("off", 99.0, replace(SETUP, on_cpu=True), False, "off (sparsity.fast_forward)"),
    ],
)  # fmt: skip
def test_auto_recomputes_on_a_gpu_only_if_the_run_does_not_fit_without(
    given: str, without: float, setup: Setup, is_on: bool, why: str
) -> None:
    chosen = choose_fast_forward(config(given), plan(without), setup, Hardware(device_memory=10))
    assert chosen == (is_on, f"fast_forward: {why}")


def test_without_a_plan_a_gpu_does_not_recompute_and_a_compiler_chooses_itself() -> None:
    is_on, line = choose_fast_forward(config("auto"), plan(9, has_memory=False), SETUP, Hardware())
    assert not is_on and "the memory of the run is unknown" in line
    assert "torch.compile" in choose_fast_forward(config("on", torch_compile=True), plan(9), SETUP, Hardware())[1]


def test_a_run_plans_its_memory_only_to_choose_on_a_gpu() -> None:
    def args(device: str, **values: Any) -> Any:
        return SimpleNamespace(
            **{"device": torch.device(device), "gradient_checkpointing": False, "torch_compile": False, **values}
        )

    assert needs_memory_plan(config("auto"), args("cuda"))
    assert not needs_memory_plan(config("auto"), args("cpu"))
    assert not needs_memory_plan(config("on"), args("cuda"))
    assert not needs_memory_plan(config("auto"), args("cuda", gradient_checkpointing=True))


def test_a_run_on_a_gpu_gives_up_copies_first_and_then_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(setup: Setup) -> Memory:
        size = 10 + 2 * setup.keeps_masked_weights + 4 * (not setup.fast_forward)
        return Memory({"all": Term(int(GIB * size))}, "step")

    given: Any = (
        Settings(SparsityConfig()),
        SimpleNamespace(device=torch.device("cuda"), gradient_checkpointing=False, torch_compile=False, world_size=1),
        SimpleNamespace(memory=memory, model_config=None),
    )
    half = replace(SETUP, masked_weights="auto")
    monkeypatch.setattr(Setup, "of_run", lambda *_: half)
    found = {}
    for size in (17, 15, 13, 11):
        monkeypatch.setattr(memory_choices, "Hardware", lambda size=size: Hardware(device_memory=size / USABLE))
        decided, lines = decide_by_memory(*given)
        found[size] = (decided.sparsity.fast_forward, decided.sparsity.masked_weights)
        assert len(lines) == 2
    assert found == {17: ("off", "kept"), 15: ("off", "made"), 13: ("on", "kept"), 11: ("on", "made")}
