import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from ast_sparse import DistillationConfig, SLoRBConfig, SparsityConfig, UserError
from ast_sparse.errors import DivergenceError
from ast_sparse.sparsity.masks import check_nm
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.training.callbacks.sparsity import sparse_optimizer
from tests.models import FAMILIES, VOCAB, generated_text, tiny_model, tiny_tokenizer
from tests.training.small_runs import blocks, count_passes, trainer, weights


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_and_ends_exactly_sparse(tmp_path: Path, family: str) -> None:
    run = trainer(tmp_path, tiny_model(family))
    before = weights(run.model)
    run.train()
    for name, layer in sparse_layers(run.model).items():
        assert check_nm(layer.weight, 2, 4, dim=layer.group_dim)
        zero = layer.weight[layer.weight == 0]
        assert zero.numel() == layer.weight.numel() // 2 and not torch.signbit(zero).any()
        assert not torch.equal(layer.weight, before[f"{name}.weight"])
    run.save_model()
    assert all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, VOCAB, (2, 16))
    run.model.eval()
    torch.testing.assert_close(reloaded(ids).logits, run.model(ids).logits, rtol=0, atol=0)


def test_first_update_equals_a_plain_loop(tmp_path: Path) -> None:
    """Loss (4), straight-through gradient, clipping off, AdamW by hand in float64: one step, every parameter."""
    model = tiny_model("llama").double()
    dense = copy.deepcopy(model)
    data = blocks(count=4)
    run = trainer(tmp_path, model, train_dataset=data, args=dict(max_steps=1, max_grad_norm=0.0, warmup_steps=0))
    run.train()

    student, lr = copy.deepcopy(dense), 3e-3
    masked = {}
    for name in sparse_layers(run.model):
        weight = student.get_submodule(name).weight
        masked[f"{name}.weight"] = weight.detach().clone()
        groups = weight.detach().abs().unflatten(1, (-1, 4))
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, dim=-1).indices, True).flatten(1)
        weight.data.mul_(keep)
    ids = torch.tensor(data["input_ids"])
    s = student(ids).logits[:, :-1].log_softmax(-1)
    t = dense(ids).logits[:, :-1].log_softmax(-1)
    ce = -s.gather(-1, ids[:, 1:, None]).mean()
    kl = (t.exp() * (t - s)).sum(-1).mean()
    loss = 0.33 * ce + 0.67 * kl
    loss.backward()
    assert run.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)  # Trainer sums losses in float32
    for name, parameter in student.named_parameters():
        start = masked.get(name, parameter.detach())
        g = parameter.grad
        # t = 1: u/(1-β1) = g; masked tensors take v from u = (1-β1) g, so √v̂ = (1-β1)|g| with λ(0) = 0
        root = 0.1 * g.abs() if name in masked else g.abs()
        expected = start - lr * g / (root + 1e-8)
        got = run.model.get_parameter(name)
        if name in masked:
            expected = torch.where(run.model.get_submodule(name.removesuffix(".weight")).mask, expected, 0)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=name)


class DecayOfUpdates(TrainerCallback):
    """λ that the optimizer has before each update, the same in all groups."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        (decay,) = {group["mask_decay"] for group in sparse_optimizer(kwargs["optimizer"]).param_groups}
        self.seen.append(decay)


def test_mask_decay_ramps_from_zero_over_a_quarter_of_the_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, sparsity=SparsityConfig(mask_interval=1, mask_decay=8e-3), args=dict(max_steps=16))
    used = DecayOfUpdates()
    run.add_callback(used)
    run.train()
    expected = pytest.approx([0.0, 2e-3, 4e-3, 6e-3] + [8e-3] * 12)
    assert used.seen == expected
    assert [log["mask_decay"] for log in run.state.log_history if "mask_decay" in log] == expected


def test_flip_rates_are_logged_at_every_refresh_with_the_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    steps = [log["step"] for log in run.state.log_history if "flip_rate" in log]
    assert steps == [2, 4, 6]
    assert [log["step"] for log in run.state.log_history if "loss" in log] == [1, 2, 3, 4, 5, 6]
    rows = [json.loads(line) for line in (tmp_path / "mask_history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps
    assert rows[0]["flip_rate"] == rows[0]["initial_flip_rate"] > 0
    assert set(rows[0]["layers"]) == set(run.sparsity_report.pruned)


def test_masks_are_refreshed_only_at_the_interval(tmp_path: Path) -> None:
    run = trainer(tmp_path, sparsity=SparsityConfig(mask_interval=4), args=dict(max_steps=7, learning_rate=1e-2))
    run.train()
    assert [log["step"] for log in run.state.log_history if "flip_rate" in log] == [4]


def test_fixed_masks_never_move(tmp_path: Path) -> None:
    run = trainer(tmp_path, sparsity=SparsityConfig(mask_interval=0), args=dict(learning_rate=1e-2))
    before = {name: layer.mask.clone() for name, layer in sparse_layers(run.model).items()}
    run.train()
    assert all(torch.equal(layer.mask, before[name]) for name, layer in sparse_layers(run.model).items())
    assert not any("flip_rate" in log for log in run.state.log_history)


@pytest.mark.parametrize("distillation", [None, DistillationConfig(alpha=0.0)])
def test_no_teacher_is_loaded_without_kl(tmp_path: Path, distillation: DistillationConfig | None) -> None:
    run = trainer(tmp_path, distillation_config=distillation)
    assert run.teacher is None
    run.train()


def test_teacher_is_the_frozen_dense_model_outside_the_student(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = weights(model)
    run = trainer(tmp_path, model)
    run.train()
    assert run.teacher is not None and not run.teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in run.teacher.parameters())
    assert not any(module is run.teacher for module in run.model.modules())


def test_accumulation_of_unequal_batches_equals_one_large_batch(tmp_path: Path) -> None:
    rows = blocks(count=8)["input_ids"]
    labels = [[-100] * (i * 2) + row[i * 2 :] for i, row in enumerate(rows)]  # each row counts differently
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})
    results = []
    for name, batch, steps in (("a", 8, 1), ("b", 2, 4)):
        run = trainer(
            tmp_path / name, tiny_model("llama").double(), train_dataset=data, sparsity=SparsityConfig(mask_interval=0),
            args=dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=3),
        )  # fmt: skip
        run.train()
        results.append(([log["loss"] for log in run.state.log_history if "loss" in log], weights(run.model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)  # Trainer sums losses in float32
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-7, atol=1e-9)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    results, passes = [], []
    for checkpointing in (False, True):
        run = trainer(tmp_path / str(checkpointing), args=dict(gradient_checkpointing=checkpointing))
        passes.append(count_passes(run.model))
        run.train()
        results.append(weights(run.model))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert len(passes[1]) - len(passes[0]) == 6  # another one in each step


def test_bf16_autocast_keeps_float32_masters_and_a_bf16_teacher(tmp_path: Path) -> None:
    run = trainer(tmp_path, args=dict(bf16=True))
    run.train()
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in run.teacher.parameters()} == {torch.bfloat16}
    assert run.teacher.model.rotary_emb.inv_freq.dtype == torch.float32  # in bf16, late positions would be wrong


@pytest.mark.parametrize("trained", [True, False])
def test_slorb_is_trained_and_saved_with_the_model(tmp_path: Path, trained: bool) -> None:
    run = trainer(tmp_path, slorb_config=SLoRBConfig(k=16, train_projection=trained), args=dict(weight_decay=0.1))
    before = weights(run.model)
    run.train()
    run.save_model()
    after = weights(run.model)
    for name in (name for name in before if ".slorb." in name):
        assert torch.equal(before[name], after[name]) == (name.endswith(".X") and not trained), name
    groups = run.optimizer.param_groups
    slorb = {p for layer in sparse_layers(run.model).values() for p in layer.slorb.parameters() if p.requires_grad}
    assert all(group["weight_decay"] == 0 for group in groups if slorb & set(group["params"]))
    from ast_sparse import load_causal_lm

    ids = torch.randint(0, VOCAB, (2, 16))
    run.model.eval()
    torch.testing.assert_close(load_causal_lm(tmp_path)(ids).logits, run.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_norms_and_biases_have_no_weight_decay(tmp_path: Path) -> None:
    run = trainer(tmp_path, tiny_model("qwen2"), args=dict(weight_decay=0.1))
    run.create_optimizer()
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    for group in run.optimizer.param_groups:
        spared = [name for p in group["params"] if "norm" in (name := names[p]) or name.endswith("bias")]
        assert not spared or (group["weight_decay"] == 0 and len(spared) == len(group["params"]))
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == sum(
        p.requires_grad for p in run.model.parameters()
    )


def test_evaluation_reports_the_cross_entropy_and_its_perplexity(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=blocks(count=6, seed=1))
    metrics = run.evaluate()
    ids = torch.tensor(blocks(count=6, seed=1)["input_ids"])
    log_p = run.model(ids).logits[:, :-1].log_softmax(-1)
    loss = -log_p.gather(-1, ids[:, 1:, None]).mean().item()
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)


def test_raw_text_is_tokenised_and_packed(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": [generated_text(40)]})
    run = trainer(tmp_path, train_dataset=data, processing_class=tiny_tokenizer(), block_size=16)
    assert len(run.train_dataset[0]["input_ids"]) == 16
    run.train()


def test_schedule_that_reaches_its_floor_before_the_end_can_be_set(tmp_path: Path) -> None:
    scheduler = dict(num_stable_steps=0, num_decay_steps=6, decay_type="cosine", min_lr_ratio=0.1)
    run = trainer(
        tmp_path,
        args=dict(max_steps=12, warmup_steps=2, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=scheduler),
    )
    run.train()
    rates = [log["learning_rate"] for log in run.state.log_history if "learning_rate" in log]
    assert max(rates) == pytest.approx(3e-3)
    assert rates[8:] == pytest.approx([3e-4] * 4) and rates[7] > 3.1e-4


def test_loss_that_is_not_finite_stops_with_step_and_last_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, args=dict(save_strategy="steps", save_steps=2))

    def poison(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if run.state.global_step == 3 else output

    run.model.lm_head.register_forward_hook(poison)
    with pytest.raises(UserError, match=r"diverged at step 4: loss is nan.*checkpoint-2"):
        run.train()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        run.save_model()
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_are_not_finite_end_in_no_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, args=dict(save_strategy="steps", save_steps=2))

    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                kwargs["model"].lm_head.weight.data[0, 0] = float("inf")

    run.add_callback(Poison())
    with pytest.raises(DivergenceError, match=r"diverged at step 2: `.*` has values that are not finite"):
        run.train()
    assert list(tmp_path.glob("checkpoint-*")) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_count_slorb_but_no_masks_and_no_embeddings(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    parameters = model.num_parameters(exclude_embeddings=True) + VOCAB * 32  # the head has the embedding's weight
    run = trainer(tmp_path, model, slorb_config=SLoRBConfig())
    slorb = sum(p.numel() for layer in sparse_layers(model).values() for p in layer.slorb.parameters())
    assert run.floating_point_ops({"input_ids": torch.zeros(2, 16)}) == 6 * 2 * 16 * (parameters + slorb)
