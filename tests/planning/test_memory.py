"""What a plan says of memory against hand-computed values and against a step on real tensors."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel, TrainingArguments

from ast_sparse import DistillationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.distillation import sliced
from ast_sparse.distillation.gpu_rows import planned_for_gpu
from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.planning.fit import find_fit
from ast_sparse.planning.host import held_to_save, host_memory
from ast_sparse.planning.live_bytes import LiveBytes
from ast_sparse.planning.memory import Memory, MemoryModel
from ast_sparse.planning.setup import Setup
from ast_sparse.planning.sizes import Term
from ast_sparse.sparsity.model import sparsify_model
from tests.models import FAMILIES, VOCAB, tiny_config, tiny_model
from tests.training.small_runs import trainer

SETUP = Setup(
    batch_size=4, eval_batch_size=0, gradient_accumulation_steps=1, block_size=64, dtype=torch.float32,
    gradient_checkpointing=False,
)  # fmt: skip


@cache
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


@pytest.mark.parametrize(
    ("family", "checkpointing", "is_fast"),
    [*((family, checkpointing, True) for family in FAMILIES for checkpointing in (False, True)),
     ("llama", False, False), ("gpt2", False, False)],
)  # fmt: skip
def test_a_planned_step_holds_what_a_real_one_does(
    tmp_path: Path, family: str, checkpointing: bool, is_fast: bool
) -> None:
    run = trainer(
        tmp_path, tiny_model(family), slorb_config=SLoRBConfig(k=16), args=dict(gradient_checkpointing=checkpointing)
    )
    if checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    run.model.train()
    ids = torch.randint(0, 100, (4, 64))
    live = LiveBytes()
    live.ignore([tensor for model in (run.model, run.teacher) for tensor in (*model.parameters(), *model.buffers())])
    models = (run.model, run.teacher) if is_fast else ()
    with live, run._settings_of_trainer(), fast_forward(*models):  # as `train` and `training_step` do
        run.compute_loss(run.model, {"input_ids": ids, "labels": ids}).backward()
    planned = memory_model(family, DistillationConfig(), SLoRBConfig(k=16))(
        replace(SETUP, gradient_checkpointing=checkpointing, fast_forward=is_fast, on_cpu=True)
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
    setup = replace(SETUP, on_cpu=True)  # where the loss takes less than the block
    made_again = MemoryModel(model, None, None)(setup).total
    monkeypatch.setattr("ast_sparse.kernels.fast_forward.find_gated_mlp", lambda module: None)
    kept = MemoryModel(model, None, None)(setup).total
    assert kept - made_again == 4 * 2 * (4 * 64) * 48  # the gated product of either block, float32


def test_on_a_gpu_the_loss_holds_a_slice_of_logits_of_both_models(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = replace(SETUP, batch_size=32, dtype=torch.bfloat16, gradient_checkpointing=True)
    monkeypatch.setattr(sliced, "_MIN_TOKENS", 1)

    def at_loss(tokens: int) -> int:
        monkeypatch.setattr(sliced, "_ELEMENTS", tokens * VOCAB)
        with planned_for_gpu():
            return memory_model.__wrapped__("llama", DistillationConfig()).passes.step(setup, True).at_loss

    inputs = 1024 * 32 * 4  # of the student's head, without ignored positions
    assert at_loss(2048) - at_loss(1024) == 2 * 1024 * VOCAB * 2 + inputs


def test_settings_move_the_peak_as_they_should() -> None:
    model = memory_model("llama", DistillationConfig(kind="tinybert"))
    usual = model(SETUP)
    assert model(replace(SETUP, gradient_checkpointing=True)).total < usual.total
    assert model(replace(SETUP, fast_forward=False)).total > usual.total
    assert model(replace(SETUP, batch_size=8)).total > 1.5 * usual.total
    assert model(replace(SETUP, dtype=torch.bfloat16)).items["teacher"] == usual.items["teacher"] // 2
    accumulated = model(replace(SETUP, gradient_accumulation_steps=2))
    assert accumulated.items["gradients"] == accumulated.items["weights (float32 masters)"]
    assert model(replace(SETUP, eval_batch_size=64)).moment == "evaluation"
    several = replace(SETUP, world_size=4, sharding="ddp")  # gradients are views of DDP's buckets
    assert model(several).items["gradients"] == usual.items["weights (float32 masters)"]
    buckets = model(replace(several, gradient_accumulation_steps=2)).items["buckets of DDP, which the last batch fills"]
    assert buckets == usual.items["weights (float32 masters)"]
    sharded = model(replace(SETUP, world_size=4, sharding="fsdp2"))
    assert sharded.items["moments"] == usual.items["moments"] // 4


def test_what_is_sharded_and_what_is_gathered_is_hand_computed() -> None:
    block = 3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32  # parameters; two blocks
    outside = VOCAB * 32 + 32  # of a head that is tied
    sharded = replace(SETUP, world_size=8, sharding="fsdp2", shard_size=4, gradient_accumulation_steps=2)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = memory_model("llama", DistillationConfig())
        moments = model.moments(replace(sharded, dtype=dtype))
        items = {name: term.size for name, term in moments["forward and backward pass"].items()}
        assert items["weights (float32 masters)"] == items["gradients"] == 4 * (2 * block + outside) // 4
        assert items["masks"] == (15_360 + 15_360 // 8) // 4
        assert items["teacher"] == size * outside + size * 2 * block // 4
        assert (
            items["gathered head"] == size * outside and items["gathered blocks: current and next"] == 2 * size * block
        )
        assert items["masked pieces on their way"] == size * block // 4
        assert items["gradients of a block; those being sent"] == size * block + 4 * max(block, outside)
        last = {name: term.size for name, term in moments["reduction of the last gradients"].items()}
        assert last["their gradients, and a copy to send"] == (size + 4) * outside
        kept = model.moments(replace(sharded, dtype=dtype, syncs_each_batch=False))["forward and backward pass"]
        assert kept["whole gradients between micro-batches"].size == 4 * (2 * block + outside)


def test_blocks_are_recomputed_by_either_setting(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"activation_checkpointing": True}]
    setups = [
        Setup.of(TrainingArguments(str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=config), 64, 2, "fsdp2")
        for config in settings
    ]
    assert [setup.gradient_checkpointing for setup in setups] == [False, True]
    usual = TrainingArguments(str(tmp_path), use_cpu=True, gradient_checkpointing=True)
    assert Setup.of(usual, 64, 1, "none").gradient_checkpointing


def test_a_sharded_student_is_measured_in_pieces_and_saved_file_by_file() -> None:
    sharded = replace(SETUP, world_size=4, sharding="fsdp2", measured_tokens=64)
    model, moments = memory_model("llama", DistillationConfig()), {}
    for on_cpu in (False, True):
        moments = model.moments(replace(sharded, on_cpu=on_cpu))
        assert moments["measurement of perplexities"]["gathered head"].size == 4 * (VOCAB * 32 + 32)
        assert ("saving of the trained model" in moments) == on_cpu
    assert moments["saving of the trained model"]["to save"].size == 4 * 19_616
    host = host_memory(sharded, model.sizes, model.teacher_sizes, 4, calibrates=False)
    assert host["while the first process saves the model"].size == 4 * 19_616
    assert host["while models are read"].size == 4 * 4 * VOCAB * 32  # a tensor at a time
    whole_models = host_memory(replace(SETUP, world_size=4, sharding="ddp"), model.sizes, model.teacher_sizes, 4, False)
    assert whole_models["while models are read"].size == 4 * (4 + 4) * 19_616
    large = replace(model.sizes, weights=2 * 10**9, slorb=10**8)  # 7.6 GB without SLoRB, in files of 4 GB
    assert held_to_save(large, whole=False).size == 4 * 10**9 + 4 * 10**8
    assert held_to_save(replace(large, tensor=15 * 10**8), whole=False).size == 4 * (15 * 10**8 + 10**8)
    assert held_to_save(large, whole=True).size == 8 * 10**9 + 4 * 15_360 + 15_360 + 15_360 // 8


def test_one_process_has_the_whole_model_to_make_a_start() -> None:
    model = memory_model("llama", None)
    for sharding in ("ddp", "fsdp2"):
        setup = replace(SETUP, world_size=4, sharding=sharding)
        plain, text = (host_memory(setup, model.sizes, None, 4, calibrates) for calibrates in (False, True))
        assert {**plain, "while one process makes the start": text["while one process makes the start"]} == text
        assert text["while one process makes the start"].size == 4 * 19_616


def test_offloaded_masters_and_moments_are_on_the_host() -> None:
    model = memory_model("llama", DistillationConfig())
    offloaded = replace(SETUP, offload=True, dtype=torch.bfloat16, gradient_accumulation_steps=2)
    items = {name: term.size for name, term in model.moments(offloaded)["forward and backward pass"].items()}
    assert items["masked weights; embeddings, head, norms"] == 2 * 15_360 + 4 * (19_616 - 15_360)
    assert items["gradients"] == 4 * 19_616 and "moments" not in items and "masks" not in items
    host = host_memory(offloaded, model.sizes, model.teacher_sizes, 1, calibrates=False)
    masks, buffers = 15_360 + 15_360 // 8, 2 * (4 + 2) * VOCAB * 32
    assert host["offloaded: masters, moments, masks, buffers"].size == 12 * 19_616 + masks + buffers
    saving = {name: term.size for name, term in model.moments(offloaded)["saving of the trained model"].items()}
    assert saving["weights (float32 masters)"] + saving["to save"] == 4 * (19_616 + 15_360) and not saving["moments"]
    in_8_bits = model(replace(SETUP, moments="8bit")).items["moments"]
    assert in_8_bits == int(15_360 * (2 + 2 * 4 / 256)) + 8 * (19_616 - 15_360)


def counted(setup: Setup) -> Memory:
    """100 a sequence, a third of it with checkpointing, 900 that FSDP2 shards, and 300 for a measurement."""
    activations = setup.batch_size * 100 // (3 if setup.gradient_checkpointing else 1)
    activations += 0 if setup.fast_forward or setup.gradient_checkpointing else 25 * setup.batch_size
    shards = setup.world_size if setup.sharding == "fsdp2" else 1
    whole = 300 if setup.measured_by else 0
    held = 200 if setup.offload else 900 // shards
    sizes = {"held": held, "activations": activations, "whole": whole}
    return Memory({name: Term(size) for name, size in sizes.items()}, "step")


MEASURES = ("evaluation.datasets=[]", "evaluation.report=false")


@pytest.mark.parametrize(
    ("setup", "limit", "settings"),
    [
        (replace(SETUP, batch_size=2), 980, ["training.gradient_checkpointing=true"]),
        (replace(SETUP, batch_size=2, fast_forward=False), 1100, ["sparsity.fast_forward=on"]),
        (replace(SETUP, batch_size=2, fast_forward=False), 980, ["training.gradient_checkpointing=true"]),
        (
            replace(SETUP, batch_size=8), 940,
            ["training.gradient_checkpointing=true", "training.per_device_train_batch_size=1",
             "training.gradient_accumulation_steps=8"],
        ),
        (replace(SETUP, batch_size=1, world_size=2, sharding="ddp"), 600, ["training.fsdp=true"]),
        (replace(SETUP, batch_size=1), 230, ["training.fsdp=true", "8 devices"]),
        (
            replace(SETUP, batch_size=1, gradient_accumulation_steps=8, measured_by=MEASURES, world_size=2,
                    sharding="ddp"), 290,
            ["training.gradient_checkpointing=true", "training.gradient_accumulation_steps=4", "training.fsdp=true",
             *MEASURES, "4 devices"],
        ),
        (replace(SETUP, batch_size=1), 320, ["optimizer.offload=true"]),
        (
            replace(SETUP, batch_size=1, sharding="fsdp2", gradient_checkpointing=True), 250,
            ["training.gradient_checkpointing=true", "training.fsdp=false", "training.fsdp_config=null",
             "optimizer.offload=true"],
        ),
        (replace(SETUP, batch_size=1), 20, None),
    ],
)  # fmt: skip
def test_the_fix_is_the_least_that_fits(setup: Setup, limit: int, settings: list[str] | None) -> None:
    fit = find_fit(counted, setup, limit, can_shard=True, can_halve=False, can_offload=True)
    assert (None if fit is None else fit.settings(setup)) == settings
    assert fit is None or fit.memory.total <= limit


def test_bf16_is_a_fix_where_the_device_has_it_and_sharding_where_the_model_allows() -> None:
    def memory(setup: Setup) -> Memory:
        return Memory({"all": Term(10 if setup.is_half else 20)}, "step")

    assert find_fit(memory, SETUP, 15, can_shard=False, can_halve=False, can_offload=False) is None
    fit = find_fit(memory, SETUP, 15, can_shard=False, can_halve=True, can_offload=False)
    assert fit is not None and fit.settings(SETUP) == ["training.bf16=true"]


def test_the_same_pass_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = memory_model("llama", None), []
    kept = model.passes._run

    def counting(*args: Any, **kwargs: Any) -> Any:
        runs.append(args)
        return kept(*args, **kwargs)

    monkeypatch.setattr(model.passes, "_run", counting)
    accumulated = replace(SETUP, gradient_accumulation_steps=2)
    first, second = model(accumulated), model(replace(accumulated, world_size=8, sharding="ddp"))
    assert len(runs) == 1 and second.total - first.total == first.items["weights (float32 masters)"]
    assert isinstance(model.student.lm_head.weight, Tensor) and model.student.lm_head.weight.grad is None


def test_every_line_of_llama2_7b_on_eight_devices_is_that_of_a_hand_count() -> None:
    """Untied embeddings of 32,000 x 4,096; blocks of 4 x 4,096² + 3 x 4,096 x 11,008 weights and two norms.

    Here 2 of its 32 blocks, because a pass of all takes seconds.
    """
    blocks, tokens = 2, 4096
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=blocks,
        num_attention_heads=32, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    teacher = copy.deepcopy(student)
    sparsify_model(student, SparsityConfig())
    setup = Setup(
        batch_size=1, eval_batch_size=0, gradient_accumulation_steps=16, block_size=tokens, dtype=torch.bfloat16,
        gradient_checkpointing=True, world_size=8, sharding="fsdp2",
    )  # fmt: skip
    memory = MemoryModel(student, teacher, DistillationConfig(ce_weight=1.0, kl_weight=0.5, temperature=2.0))(setup)
    embedding, masked = 32_000 * 4096, 4 * 4096**2 + 3 * 4096 * 11_008
    block = masked + 2 * 4096
    everything = 2 * embedding + 4096 + blocks * block
    assert everything + 30 * block == 6_738_415_616
    by_hand = {
        "weights (float32 masters)": 4 * everything // 8,
        "masks": blocks * (masked + masked // 8) // 8,
        "moments": 8 * everything // 8,
        "teacher": 2 * blocks * block // 8 + 2 * (2 * embedding + 4096),
        "gradients": 4 * everything // 8,
        "gathered blocks: current and next": 2 * 2 * block,
        "masked pieces on their way": 2 * block // 8,
        "gradients of a block; those being sent": (2 + 4) * block,
    }
    activations = "activations, logits, temporaries"
    assert memory.moment == "forward and backward pass"
    assert {name: size for name, size in memory.items.items() if name != activations} == by_hand
    # in tensors of 4,096 tokens x 4,096 x 2 bytes: the input of each block; in the block that runs again two norms in
    # float32, their outputs, q, k, v before and after rotation, attention and sums; the MLP's four, two gradients of it
    tensors = blocks + 12 + 6 * 11_008 / 4096 + 1
    assert memory.items[activations] == pytest.approx(tensors * tokens * 4096 * 2, rel=0.05)
    assert memory.terms["teacher"].how == "404,766,720 x 2 bytes / 8 + 262,148,096 x 2 bytes"


def test_an_offloaded_model_with_conv1d_layers_is_planned_too() -> None:
    memory = memory_model("gpt2", None)
    assert memory(replace(SETUP, offload=True)).total < memory(SETUP).total
