"""What a plan says of memory against hand-computed values and against a step on real tensors."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel, TrainingArguments

from ast_sparse import DistillationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.planning.fit import find_fit
from ast_sparse.planning.live_bytes import LiveBytes
from ast_sparse.planning.memory import Memory, MemoryModel, Setup
from ast_sparse.sparsity.model import sparsify_model
from tests.models import FAMILIES, VOCAB, tiny_config, tiny_model
from tests.training.small_runs import trainer

SETUP = Setup(
    batch_size=4, eval_batch_size=0, gradient_accumulation_steps=1, block_size=64, dtype=torch.float32,
    gradient_checkpointing=False,
)  # fmt: skip


def memory_model(family: str, distillation: DistillationConfig | None, slorb: SLoRBConfig | None = None) -> MemoryModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    dense = None if distillation is None else copy.deepcopy(model)
    sparsify_model(model, SparsityConfig(), slorb)
    return MemoryModel(model, dense, distillation)


def test_live_bytes_are_those_of_a_hand_count() -> None:
    given = torch.ones(1000)
    live = LiveBytes()
    live.ignore([given])
    with live:
        doubled = given * 2
        shared = doubled.view(10, 100)
        assert live.now == 4000
        halves = (shared * 3).half()  # 4000 for the product while the 2000 come
        assert (live.now, live.peak) == (6000, 10000)
        del doubled, halves
        assert live.now == 4000
        del shared
    assert live.now == 0


def test_what_a_run_holds_is_hand_computed() -> None:
    held = memory_model("llama", DistillationConfig())(SETUP).items
    assert held["weights (float32 masters)"] == 4 * 19_616
    assert held["teacher"] == 4 * 19_616 and held["moments"] == 8 * 19_616
    assert held["masks"] == 15_360 + 15_360 // 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_planned_step_holds_what_a_real_one_does(tmp_path: Path, family: str, checkpointing: bool) -> None:
    run = trainer(
        tmp_path, tiny_model(family), slorb_config=SLoRBConfig(k=16), args=dict(gradient_checkpointing=checkpointing)
    )
    if checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    run.model.train()
    ids = torch.randint(0, 100, (4, 64))
    live = LiveBytes()
    live.ignore([tensor for model in (run.model, run.teacher) for tensor in (*model.parameters(), *model.buffers())])
    with live, run._settings_of_trainer(), fast_forward(run.model, run.teacher):  # as `train` and `training_step` do
        run.compute_loss(run.model, {"input_ids": ids, "labels": ids}).backward()
    planned = memory_model(family, DistillationConfig(), SLoRBConfig(k=16))(
        replace(SETUP, gradient_checkpointing=checkpointing)
    )
    assert planned.moment == "forward and backward pass"
    passing = ("activations, logits, temporaries", "gradients")
    assert sum(planned.items.get(name, 0) for name in passing) == pytest.approx(live.peak, rel=0.05)


def test_a_gated_mlp_of_one_product_is_planned_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Phi3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    sparsify_model(model, SparsityConfig())
    made_again = MemoryModel(model, None, None)(SETUP).total
    monkeypatch.setattr("ast_sparse.kernels.fast_forward.find_gated_mlp", lambda module: None)
    kept = MemoryModel(model, None, None)(SETUP).total
    assert kept - made_again == 4 * 2 * (4 * 64) * 48  # the gated product of either block, float32


def test_settings_move_the_peak_as_they_should() -> None:
    model = memory_model("llama", DistillationConfig(kind="tinybert"))
    usual = model(SETUP)
    assert model(replace(SETUP, gradient_checkpointing=True)).total < usual.total
    assert model(replace(SETUP, batch_size=8)).total > 1.5 * usual.total
    assert model(replace(SETUP, dtype=torch.bfloat16)).items["teacher"] == usual.items["teacher"] // 2
    accumulated = model(replace(SETUP, gradient_accumulation_steps=2))
    assert accumulated.items["gradients"] == accumulated.items["weights (float32 masters)"]
    assert model(replace(SETUP, eval_batch_size=64)).moment == "evaluation"
    several = model(replace(SETUP, world_size=4, sharding="ddp"))
    assert several.items["gradient buckets of DDP"] == several.items["weights (float32 masters)"]
    sharded = model(replace(SETUP, world_size=4, sharding="fsdp2"))
    assert sharded.items["moments"] == usual.items["moments"] // 4


def test_what_is_sharded_and_what_is_gathered_is_hand_computed() -> None:
    block = 3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32  # parameters; two blocks
    outside = VOCAB * 32 + 32  # of a head that is tied
    masks = 7_680 + 7_680 // 8  # bytes of a block
    sharded = replace(SETUP, world_size=4, sharding="fsdp2")
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        items = memory_model("llama", DistillationConfig())(replace(sharded, dtype=dtype)).items
        assert items["weights (float32 masters)"] == 4 * (2 * block + outside) // 4
        assert items["teacher"] == size * outside + size * 2 * block // 4
        assert items["gathered blocks and embeddings"] == size * outside + 2 * (size * block + masks)
        assert items["gradients before they are sharded"] == (4 + size) * block


def test_blocks_are_recomputed_by_either_setting(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"activation_checkpointing": True}]
    setups = [
        Setup.of(TrainingArguments(str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=config), 64, 2, "fsdp2")
        for config in settings
    ]
    assert [setup.gradient_checkpointing for setup in setups] == [False, True]
    usual = TrainingArguments(str(tmp_path), use_cpu=True, gradient_checkpointing=True)
    assert Setup.of(usual, 64, 1, "none").gradient_checkpointing


def test_a_sharded_run_that_measures_is_whole_at_its_end() -> None:
    """The student is gathered for that, beside what every process holds."""
    sharded = replace(SETUP, world_size=4, sharding="fsdp2")
    model, moment = memory_model("llama", DistillationConfig()), "measurement of the retrained model"
    without = model(sharded)
    measured = model(replace(sharded, measured_by=("evaluation.datasets=[]",)))
    held = sum(without.items[name] for name in ("weights (float32 masters)", "masks", "moments", "teacher"))
    assert moment not in without.others
    assert measured.others[moment] == held + 4 * 19_616 + 15_360 + 15_360 // 8
    saved = model(replace(sharded, on_cpu=True))
    whole = saved.total if "saving" in saved.moment else saved.others["saving of the retrained model"]
    assert whole == measured.others[moment] + 4 * 15_360


def counted(setup: Setup) -> Memory:
    """100 a sequence, a third of it with checkpointing, 900 that FSDP2 shards, and 300 for a measurement."""
    activations = setup.batch_size * 100 // (3 if setup.gradient_checkpointing else 1)
    shards = setup.world_size if setup.sharding == "fsdp2" else 1
    whole = 300 if setup.measured_by else 0
    return Memory({"held": 900 // shards, "activations": activations, "whole": whole}, "step")


MEASURES = ("evaluation.datasets=[]", "evaluation.report=false")


@pytest.mark.parametrize(
    ("setup", "limit", "settings"),
    [
        (replace(SETUP, batch_size=2), 980, ["training.gradient_checkpointing=true"]),
        (
            replace(SETUP, batch_size=8), 940,
            ["training.gradient_checkpointing=true", "training.per_device_train_batch_size=1",
             "training.gradient_accumulation_steps=8"],
        ),
        (replace(SETUP, batch_size=1, world_size=2, sharding="ddp"), 600, ["training.fsdp=true"]),
        (replace(SETUP, batch_size=1), 400, ["training.fsdp=true", "4 devices"]),
        (
            replace(SETUP, batch_size=1, gradient_accumulation_steps=6, measured_by=MEASURES), 600,
            ["training.gradient_accumulation_steps=3", "training.fsdp=true", *MEASURES, "2 devices"],
        ),
        (replace(SETUP, batch_size=1), 20, None),
    ],
)  # fmt: skip
def test_the_fix_is_the_least_that_fits(setup: Setup, limit: int, settings: list[str] | None) -> None:
    fit = find_fit(counted, setup, limit, can_shard=True, can_halve=False)
    assert (None if fit is None else fit.settings(setup)) == settings
    assert fit is None or fit.memory.total <= limit


def test_bf16_is_a_fix_where_the_device_has_it_and_sharding_where_the_model_allows() -> None:
    def memory(setup: Setup) -> Memory:
        return Memory({"all": 10 if setup.is_half else 20}, "step")

    assert find_fit(memory, SETUP, 15, can_shard=False, can_halve=False) is None
    fit = find_fit(memory, SETUP, 15, can_shard=False, can_halve=True)
    assert fit is not None and fit.settings(SETUP) == ["training.bf16=true"]


def test_the_same_pass_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = memory_model("llama", None), []
    kept = model._run

    def counting(*args: Any, **kwargs: Any) -> Any:
        runs.append(args)
        return kept(*args, **kwargs)

    monkeypatch.setattr(model, "_run", counting)
    first, second = model(SETUP), model(replace(SETUP, world_size=8, sharding="ddp"))
    assert len(runs) == 1 and second.total - first.total == first.items["weights (float32 masters)"]
    assert isinstance(model.student.lm_head.weight, Tensor) and model.student.lm_head.weight.grad is None
