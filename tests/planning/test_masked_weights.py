"""Masked weights that are kept in 16 bits: what they take, and what `auto` makes of it."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ast_sparse import DistillationConfig, SparsityConfig
from ast_sparse.config import load_config
from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.planning import budget as budgets
from ast_sparse.planning.fit import find_fit
from ast_sparse.planning.live_bytes import LiveBytes
from ast_sparse.planning.masked_weights import settle_masked_weights
from ast_sparse.planning.memory import Memory
from ast_sparse.planning.plan import make_plan
from ast_sparse.planning.setup import Setup
from ast_sparse.planning.sizes import Term
from ast_sparse.run import memory_choices
from ast_sparse.run.memory_choices import decide_by_memory, needs_memory_plan
from ast_sparse.sparsity.model import sparse_layers, use_masked_weights
from tests.models import save_tiny_model, tiny_model
from tests.planning.test_memory import SETUP, memory_model
from tests.training.small_runs import arguments, trainer

HALF = replace(SETUP, dtype=torch.bfloat16, masked_weights="kept")
AUTO = replace(HALF, masked_weights="auto")
ITEM = "masked weights in 16 bits"
PASSING = ("activations, logits, temporaries", "gradients")


def test_copies_take_two_bytes_a_masked_weight_where_they_are_kept() -> None:
    model = memory_model("llama", None)
    moments = model.moments(replace(HALF, eval_batch_size=4))
    assert {name for name, items in moments.items() if items.get(ITEM, Term(0)).size == 2 * 15_360} == {
        "forward and backward pass", "update of the weights"
    }  # fmt: skip
    assert model(AUTO).items == model(HALF).items
    for choice in ("made", None):  # a compiled graph holds them too, unless it recomputes blocks
        in_graphs = replace(HALF, masked_weights=choice, in_graphs=True)
        found = model.moments(in_graphs)
        assert found["forward and backward pass"] == moments["forward and backward pass"]
        assert not found["update of the weights"][ITEM].size
        assert ITEM not in model(replace(in_graphs, gradient_checkpointing=True)).items
    for choice in ("auto", "on"):  # what semi-structured products multiply by: 9/16 of the copies
        more = model.moments(replace(HALF, semi_structured=choice))
        for name in ("forward and backward pass", "update of the weights"):
            assert sum(term.size for term in more[name].values()) == 15_360 * 9 // 8 + sum(
                term.size for term in moments[name].values()
            )
    for setup in (
        replace(HALF, masked_weights="made"), replace(HALF, dtype=torch.float32), replace(HALF, offload=True),
        replace(HALF, masked_weights=None),
        replace(HALF, sharding="fsdp2", world_size=2),
    ):  # fmt: skip
        assert not any(items.get(ITEM, Term(0)).size for items in model.moments(setup).values())


@pytest.mark.parametrize(("checkpointing", "choice"), [(True, "kept"), (False, "kept"), (False, "made")])
def test_a_planned_step_holds_what_a_real_one_does(tmp_path: Path, checkpointing: bool, choice: Any) -> None:
    run = trainer(tmp_path, tiny_model("llama"), args=dict(bf16=True, gradient_checkpointing=checkpointing))
    if checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    run.model.train()
    use_masked_weights(run.model, choice)
    ids = torch.randint(0, 100, (4, 64))
    batch = {"input_ids": ids, "labels": ids}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run.compute_loss(run.model, dict(batch))  # the first pass of a step writes the copies
    live = LiveBytes()
    copies = [layer.masked_copy for layer in sparse_layers(run.model).values()]
    live.ignore([each._written.values for each in copies if each is not None and each._written is not None])
    live.ignore([tensor for model in (run.model, run.teacher) for tensor in (*model.parameters(), *model.buffers())])
    with live, run._settings_of_trainer(), fast_forward(run.model, run.teacher), torch.autocast("cpu", torch.bfloat16):
        run.compute_loss(run.model, batch).backward()
    setup = replace(HALF, gradient_checkpointing=checkpointing, masked_weights=choice, on_cpu=True)
    planned = memory_model("llama", DistillationConfig())(setup)
    assert sum(planned.items.get(name, 0) for name in PASSING) == pytest.approx(live.peak, rel=0.05)


def counted(setup: Setup) -> Memory:
    kept = 100 * setup.keeps_masked_weights + 50 * (setup.compressed_bytes > 0)
    return Memory({"all": Term(1000 // (2 if setup.is_half else 1) + kept)}, "step")


@pytest.mark.parametrize(
    ("setup", "limit", "choice", "line"),
    [
        (HALF, 1, "kept", "a 16-bit copy of each is kept (sparsity.masked_weights=kept)"),
        (replace(HALF, masked_weights="made"), 1e9, "made", "whenever they are needed (sparsity.masked_weights=made)"),
        (AUTO, 600, "kept", "is kept (sparsity.masked_weights=auto: the memory is enough)"),
        (AUTO, 599, "made", "they are needed (sparsity.masked_weights=auto: the memory is not enough for copies)"),
        (AUTO, 499, "made", "the memory is not enough in either case)"),
        (replace(AUTO, in_graphs=True), 599, "kept", "auto: the compiled graphs would hold what they make)"),
        (replace(AUTO, in_graphs=True, gradient_checkpointing=True), 599, "made", "not enough for copies)"),
        (replace(AUTO, semi_structured="auto"), 650, "kept", "auto: the memory is enough)"),
        (replace(AUTO, semi_structured="auto"), 599, "made", "not enough for copies)"),
        (replace(AUTO, semi_structured="on"), 1, "kept", "auto: sparsity.semi_structured=on needs it)"),
        (replace(AUTO, on_cpu=True), 1, "kept", "always on a CPU)"),
        (replace(SETUP, masked_weights="auto"), 1, "auto", None),
        (replace(HALF, masked_weights=None), 1, None, None),
        (replace(HALF, sharding="fsdp2"), 1, "kept", None),
    ],
)  # fmt: skip
def test_auto_keeps_them_unless_only_that_does_not_fit(
    setup: Setup, limit: float, choice: str | None, line: str | None
) -> None:
    settled, said = settle_masked_weights(counted, setup, limit)
    assert settled == replace(setup, masked_weights=choice)
    assert said is None if line is None else said is not None and said.endswith(line)


def test_semi_structured_products_are_given_up_before_copies_are() -> None:
    wanted = replace(AUTO, semi_structured="auto")
    settled, said = settle_masked_weights(counted, wanted, 649)
    assert settled == replace(wanted, masked_weights="kept", semi_structured="off")
    assert said is not None and said.endswith("auto: the memory is enough; no memory for semi-structured products)")
    settled, said = settle_masked_weights(counted, replace(wanted, masked_weights="kept"), 649)
    assert settled == replace(wanted, masked_weights="kept", semi_structured="off")
    assert said is not None and said.endswith("=kept; no memory for semi-structured products)")
    settled, said = settle_masked_weights(counted, replace(wanted, in_graphs=True), 649)
    assert settled.semi_structured == "off" and "what they make; no memory for semi-structured" in str(said)
    on_cpu, _ = settle_masked_weights(counted, replace(wanted, on_cpu=True), 1)
    assert on_cpu.semi_structured == "auto"  # `Setup.of_run` has set it off
    can = dict(can_shard=True, can_halve=True, can_offload=False)
    for limit, settings in (
        (649, ["sparsity.semi_structured=off"]),
        (599, ["sparsity.masked_weights=made", "sparsity.semi_structured=off"]),
    ):
        fit = find_fit(counted, replace(HALF, semi_structured="on"), limit, **can)
        assert fit is not None and fit.settings(replace(HALF, semi_structured="on")) == settings
    fit = find_fit(counted, replace(HALF, semi_structured="auto"), 649, **can)  # `auto` will see by itself
    assert fit is not None and fit.settings(replace(HALF, semi_structured="auto")) == []


def test_a_run_that_asks_for_copies_and_has_no_memory_for_them_is_told_to_make_them() -> None:
    can = dict(can_shard=False, can_halve=True, can_offload=False)
    fit = find_fit(counted, HALF, 550, **can)
    assert fit is not None and fit.settings(HALF) == ["sparsity.masked_weights=made"]
    single = replace(SETUP, masked_weights="auto")  # `auto` will see by itself
    fit = find_fit(counted, single, 550, **can)
    assert fit is not None and fit.settings(single) == ["training.bf16=true"]


CONFIG = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/text.txt, block_size: 16, eval_share: 0}}
evaluation: {{datasets: []}}
training: {{bf16: true}}
"""


def test_a_run_on_a_gpu_decides_by_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    config = load_config(tmp_path / "run.yaml")
    config = replace(config, sparsity=SparsityConfig(fast_forward="off"))
    args: Any = arguments(tmp_path, bf16=True)
    assert not needs_memory_plan(config, args)  # on a CPU
    monkeypatch.setattr(type(args), "device", torch.device("cuda"))
    assert needs_memory_plan(config, args)
    for other in (dict(masked_weights="kept"), dict(forward="dense")):
        assert not needs_memory_plan(replace(config, sparsity=SparsityConfig(fast_forward="off", **other)), args)
    for mode, recomputes, has_choice in ((None, False, True), (None, True, True), ("reduce-overhead", True, False)):
        compiled = copy.copy(args)
        compiled.torch_compile, compiled.torch_compile_mode = True, mode
        compiled.gradient_checkpointing = recomputes
        assert Setup.of_run(config, compiled, None, 1).has_masked_weights == has_choice
        assert needs_memory_plan(config, compiled) == (has_choice and recomputes)  # otherwise graphs hold them anyway
    plan = make_plan(config, args, with_memory=True)
    assert plan.memory is not None
    settings = Setup.of_run(config, args, plan.model_config, 1)
    made, kept = (
        plan.memory(replace(settings, masked_weights=choice, fast_forward=False)).total for choice in ("made", "kept")
    )
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    decided, (line,) = decide_by_memory(config, args, plan)
    assert decided.sparsity.masked_weights == "kept" and "the memory is enough" in str(line)
    properties.total_memory = (made + 1000) / budgets.USABLE
    for choice in ("auto", "kept"):
        sparsity = SparsityConfig(fast_forward="off", semi_structured="auto", masked_weights=choice)
        asks = replace(config, sparsity=sparsity)
        assert needs_memory_plan(asks, args)
        properties.total_memory = (kept + 1000) / budgets.USABLE
        decided, (line,) = decide_by_memory(asks, args, plan)
        assert (decided.sparsity.masked_weights, decided.sparsity.semi_structured) == ("kept", "off")
        properties.total_memory = 80 * 2**30
        decided, lines = decide_by_memory(asks, args, plan)
        assert (decided.sparsity.masked_weights, decided.sparsity.semi_structured) == ("kept", "auto")
        with monkeypatch.context() as patch:  # another process has less memory
            patch.setattr(memory_choices, "gather", lambda flag: [flag, True])
            decided, more = decide_by_memory(asks, args, plan)
        assert decided.sparsity.semi_structured == "off" and len(more) == len(lines) + 1
        assert "semi-structured products: off (another process has no memory for them)" in more
    unfit = replace(config, sparsity=SparsityConfig(fast_forward="off", semi_structured="auto", pattern="4:8"))
    properties.total_memory = 1  # which is not why
    assert decide_by_memory(unfit, args, plan)[0].sparsity.semi_structured == "auto"
    on_cpu = replace(asks, training={**asks.training, "use_cpu": True})
    assert Setup.of_run(asks, args, None, 1).compressed_bytes == 1.125
    assert Setup.of_run(on_cpu, args, None, 1).compressed_bytes == 0
    properties.total_memory = (made + 1000) / budgets.USABLE
    decided, (line,) = decide_by_memory(config, args, plan)
    assert decided.sparsity.masked_weights == "made" and "not enough for copies" in str(line)

    def fails(setup: Setup) -> Memory:
        raise RuntimeError("needs data")

    assert plan.model_config.use_cache and plan.model_config._attn_implementation == "sdpa"  # as a run needs them
    unknown: Any = replace(plan, memory=fails)
    assert decide_by_memory(config, args, unknown) == (config, ())
    assert decide_by_memory(config, args, replace(plan, memory=None)) == (config, ())
