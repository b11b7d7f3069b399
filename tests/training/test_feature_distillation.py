"""TinyBERT, MobileBERT and SquareHead in training: against twins that call the models directly, and what is refused."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from ast_sparse import DistillationConfig, SparsityConfig, UserError
from ast_sparse.config import DataConfig, ModelConfig, RunConfig
from ast_sparse.data.blocks.collator import CausalLMCollator
from ast_sparse.planning.plan import make_plan
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.training.checks.features import check_feature_settings
from tests.models import VOCAB, save_tiny_model, tiny_config, tiny_model
from tests.training.small_runs import arguments, blocks, count_passes, trainer, weights

KINDS = ("tinybert", "mobilebert", "squarehead")
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}


def partly_labelled(count: int = 8) -> Dataset:
    """Blocks whose rows each have a different number of counted tokens."""
    rows = blocks(count=count)["input_ids"]
    return Dataset.from_dict(
        {"input_ids": rows, "labels": [[-100] * (i * 2) + row[i * 2 :] for i, row in enumerate(rows)]}
    )


def config(kind: str, **values: Any) -> DistillationConfig:
    return DistillationConfig(
        **{
            **dict(kind=kind, ce_weight=0.4, kl_weight=0.8, temperature=2.0, hidden_weight=3.0, attention_weight=5.0),
            **values,
        }
    )


def other_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    changed = tiny_config(family)
    for name, value in changes.items():
        setattr(changed, name, value)
    return AutoModelForCausalLM.from_config(changed, dtype=torch.float32)


def looked_inside(model: PreTrainedModel, family: str, ids: torch.Tensor) -> tuple[Any, list[torch.Tensor], Any]:
    """Logits, block outputs and attention maps, by hooks of this test."""
    hidden: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        hidden.append(output if isinstance(output, torch.Tensor) else output[0])

    handles = [block.register_forward_hook(keep) for block in model.get_submodule(BLOCKS[family])]
    output = model(ids, output_attentions=True)
    for handle in handles:
        handle.remove()
    return output.logits, hidden, output.attentions


def plain_loss(student: Any, teacher: Any, labels: torch.Tensor, settings: DistillationConfig) -> torch.Tensor:
    """Mean over the positions that count, position by position."""
    (z, hidden, maps), (z_t, hidden_t, maps_t) = student, teacher
    tau, per_place = settings.temperature, []
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - 1):
            if (label := labels[row, place + 1]) == -100:
                continue
            ce = -z[row, place].log_softmax(-1)[label]
            log_p, log_t = ((each[row, place] / tau).log_softmax(-1) for each in (z, z_t))
            distance = z.new_zeros(())
            if settings.kind == "tinybert":
                distance = distance - (log_t.exp() * log_p).sum()
            if settings.kind == "squarehead":
                distance = distance + tau**2 * (log_t.exp() * (log_t - log_p)).sum()
            elif settings.hidden_weight:
                for ours, theirs in zip(hidden, hidden_t, strict=True):
                    distance = distance + settings.hidden_weight * (ours - theirs)[row, place].square().mean()
            if settings.kind != "squarehead":
                for ours, theirs in zip(maps, maps_t, strict=True):
                    seen, seen_t = ours[row, :, place, : place + 1], theirs[row, :, place, : place + 1]
                    if settings.kind == "tinybert":
                        error = (seen - seen_t).square().sum() / (ours.shape[1] * ours.shape[-1])
                    else:
                        error = (seen_t * (seen_t.log() - seen.log())).sum(-1).mean()
                    distance = distance + settings.attention_weight * error
            per_place.append(settings.weights[0] * ce + settings.weights[1] * distance)
    loss = torch.stack(per_place).mean()
    if settings.kind == "squarehead":
        counted = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        for ours, theirs in zip(hidden, hidden_t, strict=True):
            squared, size = (ours - theirs)[counted].square().sum(), theirs[counted].square().sum()
            loss = loss + settings.weights[1] * settings.hidden_weight * squared / size
    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", BLOCKS)
def test_first_loss_and_gradient_equal_a_twin_that_calls_the_models(tmp_path: Path, family: str, kind: str) -> None:
    settings, data = config(kind), partly_labelled()
    dense = tiny_model(family).double()
    run = trainer(
        tmp_path, copy.deepcopy(dense), train_dataset=data, distillation_config=settings,
        args=dict(max_steps=2, per_device_train_batch_size=8),
    )  # fmt: skip
    student = copy.deepcopy(run.model).train()
    dense.set_attn_implementation("eager")
    run.train()
    ids, labels = torch.tensor(data["input_ids"]), torch.tensor(data["labels"])
    student.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = looked_inside(dense.eval(), family, ids)
    loss = plain_loss(looked_inside(student, family, ids), theirs, labels, settings)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.requires_grad and p.grad is not None]).norm()
    first, second = (log for log in run.state.log_history if "loss" in log)
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)  # Trainer sums losses in float32
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert second["loss"] != first["loss"]


@pytest.mark.parametrize("kind", ["tinybert", "mobilebert"])
def test_accumulation_of_unequal_batches_equals_one_large_batch(tmp_path: Path, kind: str) -> None:
    results = []
    for name, batch, steps in (("a", 8, 1), ("b", 2, 4)):
        run = trainer(
            tmp_path / name, tiny_model("llama").double(), train_dataset=partly_labelled(),
            sparsity=SparsityConfig(mask_interval=0), distillation_config=config(kind),
            args=dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=3),
        )  # fmt: skip
        run.train()
        results.append(([log["loss"] for log in run.state.log_history if "loss" in log], weights(run.model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", BLOCKS)
def test_activation_checkpointing_changes_nothing(tmp_path: Path, family: str, kind: str) -> None:
    results, passes = [], []
    for checkpointing in (False, True):
        run = trainer(
            tmp_path / str(checkpointing), tiny_model(family), distillation_config=config(kind),
            args=dict(gradient_checkpointing=checkpointing, max_steps=3),
        )  # fmt: skip
        passes.append(count_passes(run.model))
        run.train()
        results.append(weights(run.model))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert len(passes[1]) - len(passes[0]) == 3  # another one in each step


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_starts_from_the_loss_of_float32(tmp_path: Path, kind: str) -> None:
    losses = []
    for bf16 in (False, True):
        run = trainer(tmp_path / str(bf16), distillation_config=config(kind), args=dict(bf16=bf16, max_steps=2))
        run.train()
        losses.append(run.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[1] != losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_cross_entropy_and_looks_inside_no_model(tmp_path: Path, kind: str) -> None:
    data = blocks(count=6, seed=1)
    run = trainer(tmp_path, distillation_config=config(kind), eval_dataset=data)
    calls: list[int] = []
    run.teacher.register_forward_hook(lambda *args: calls.append(1))
    hooks = [len(block._forward_hooks) for block in run.model.get_submodule(BLOCKS["llama"])]
    run.train()
    assert calls or kind == "mobilebert"  # which calls only the decoder of the teacher
    calls.clear()
    metrics = run.evaluate()
    assert not calls
    assert [len(block._forward_hooks) for block in run.model.get_submodule(BLOCKS["llama"])] == hooks
    ids = torch.tensor(data["input_ids"])
    log_p = run.model(ids).logits[:, :-1].log_softmax(-1)
    assert metrics["eval_loss"] == pytest.approx(-log_p.gather(-1, ids[:, 1:, None]).mean().item(), rel=1e-5)


def test_mobilebert_computes_no_logits_of_the_teacher(tmp_path: Path) -> None:
    run = trainer(tmp_path, distillation_config=config("mobilebert"), args=dict(max_steps=1))

    def forbidden(*args: Any) -> None:
        raise AssertionError("the head of the teacher ran")

    run.teacher.lm_head.register_forward_pre_hook(forbidden)
    run.train()


@pytest.mark.parametrize("kind", KINDS)
def test_no_teacher_is_loaded_if_the_distillation_has_no_weight(tmp_path: Path, kind: str) -> None:
    run = trainer(tmp_path, distillation_config=DistillationConfig(kind=kind, alpha=0.0), args=dict(max_steps=1))
    assert run.teacher is None and run.model.config._attn_implementation == "sdpa"
    run.train()


@pytest.mark.parametrize(
    ("settings", "attention"),
    [
        (config("tinybert"), "eager"),
        (config("mobilebert"), "eager"),
        (config("tinybert", attention_weight=0.0), "sdpa"),
        (config("mobilebert", attention_weight=0.0), "sdpa"),
        (config("squarehead"), "sdpa"),
    ],
)
def test_attention_becomes_eager_if_maps_are_compared_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: DistillationConfig, attention: str
) -> None:
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, distillation_config=settings, args=dict(max_steps=2))
        run.train()
    assert run.model.config._attn_implementation == run.teacher.config._attn_implementation == attention
    said = [record.message for record in caplog.records if "eager attention instead of sdpa" in record.message]
    assert len(said) == (attention == "eager")
    run.save_model()
    assert "eager" not in (tmp_path / "config.json").read_text()


def test_attention_that_is_already_eager_causes_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, model, distillation_config=config("tinybert"))
    assert "eager" not in caplog.text


def test_a_model_without_attention_maps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)  # it stays with sdpa
    with pytest.raises(UserError, match=r"kind='tinybert' needs attention maps, and the student, a LlamaForCausalLM"):
        trainer(tmp_path, model, distillation_config=config("tinybert"))
    trainer(tmp_path, model, distillation_config=config("squarehead"))


def test_a_model_that_fails_when_asked_for_attention_maps_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forward = tiny_model("llama"), type(tiny_model("llama")).forward

    def without_maps(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.pop("output_attentions", False):
            raise TypeError("no output_attentions here")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", without_maps)
    with pytest.raises(UserError, match=r"returns none: no output_attentions here\. Set"):
        trainer(tmp_path, model, distillation_config=config("mobilebert"))


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (config("tinybert"), dict(num_hidden_layers=3), "num_hidden_layers=3, the student 2"),
        (config("mobilebert"), dict(hidden_size=48), "hidden_size=48, the student 32"),
        (config("squarehead"), dict(hidden_size=48), "hidden_size=48, the student 32"),
        (config("tinybert"), dict(num_attention_heads=8), "num_attention_heads=8, the student 4"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(
    tmp_path: Path, settings: DistillationConfig, changes: dict, message: str
) -> None:
    teacher = other_model(**changes)
    with pytest.raises(UserError, match=f"distillation.kind='{settings.kind}'.* has {message}.*Choose a teacher"):
        trainer(tmp_path / "run", teacher_model=teacher, distillation_config=settings)
    teacher.save_pretrained(tmp_path / "teacher")
    save_tiny_model(tmp_path / "model")
    plan = RunConfig(
        model=ModelConfig(name_or_path=str(tmp_path / "model"), teacher=str(tmp_path / "teacher")),
        data=DataConfig(train=("text.txt",), block_size=16),
        distillation=settings,
    )
    with pytest.raises(UserError, match=message):
        make_plan(plan, arguments(tmp_path / "run"))
    make_plan(RunConfig(model=plan.model, data=plan.data), arguments(tmp_path / "run"))  # the KL takes any shape


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (config("squarehead"), dict(num_attention_heads=8)),
        (config("tinybert", attention_weight=0.0), dict(num_attention_heads=8)),
        (config("mobilebert", hidden_weight=0.0), dict(hidden_size=48)),
    ],
)
def test_a_teacher_may_differ_in_what_is_not_compared(
    tmp_path: Path, settings: DistillationConfig, changes: dict
) -> None:
    run = trainer(tmp_path, teacher_model=other_model(**changes), distillation_config=settings, args=dict(max_steps=2))
    run.train()
    assert all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values())


def test_another_teacher_of_the_same_shape_is_compared(tmp_path: Path) -> None:
    teacher = tiny_model("qwen2", seed=5)
    run = trainer(tmp_path, teacher_model=teacher, distillation_config=config("tinybert"), args=dict(max_steps=2))
    run.train()
    assert run.teacher is teacher and sparse_layers(run.model)


@pytest.mark.parametrize(("family", "name"), [("gpt2", "attn_pdrop"), ("llama", "attention_dropout")])
def test_attention_dropout_of_the_student_is_refused_if_maps_are_compared(
    tmp_path: Path, family: str, name: str
) -> None:
    model = other_model(family, **{name: 0.1})
    with pytest.raises(UserError, match=rf"{name}=0.1 of the student .*model.config_overrides: {{{name}: 0.0}}"):
        trainer(tmp_path, model, distillation_config=config("tinybert"))
    trainer(tmp_path, model, distillation_config=config("tinybert", attention_weight=0.0))


def test_settings_that_hide_the_features_are_refused(tmp_path: Path) -> None:
    student = tiny_config("llama")
    reentrant = arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    compiled = arguments(tmp_path)
    compiled.torch_compile = True
    for kind in KINDS:
        with pytest.raises(UserError, match=r"'use_reentrant': True.*Set use_reentrant: false"):
            check_feature_settings(config(kind), student, reentrant)
        with pytest.raises(UserError, match=r"training.torch_compile=True hides"):
            check_feature_settings(config(kind), student, compiled)
    for settings in (None, config("kl"), config("reverse_kl"), DistillationConfig(kind="tinybert", alpha=0.0)):
        check_feature_settings(settings, student, reentrant)
        check_feature_settings(settings, student, compiled)


def test_mobilebert_with_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    settings = config("mobilebert", hidden_weight=0.0, attention_weight=0.0)
    with pytest.raises(UserError, match="hidden_weight and attention_weight 0 distils nothing"):
        trainer(tmp_path, distillation_config=settings)


def test_right_padding_counts_in_no_loss(tmp_path: Path) -> None:
    """A row has the same loss alone and next to a longer one."""
    rows = [torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)) for length in (6, 12)]
    results = []
    for chosen in (rows[:1], rows):
        data = Dataset.from_dict(
            {
                "input_ids": [row.tolist() for row in chosen],
                "labels": [row.tolist() if len(row) == 6 else [-100] * 12 for row in chosen],
            }
        )
        run = trainer(
            tmp_path / str(len(chosen)), tiny_model("llama").double(), train_dataset=data,
            distillation_config=config("mobilebert"), args=dict(max_steps=1, per_device_train_batch_size=2),
            data_collator=CausalLMCollator(0),
        )  # fmt: skip
        run.train()
        results.append(run.state.log_history[0]["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-6)
