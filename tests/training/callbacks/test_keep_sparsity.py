"""Fine-tuning with plain `transformers.Trainer` keeps N:M."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ast_sparse import AstSparse24Config, KeepSparsityCallback, export_model, load_causal_lm
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import check_nm
from tests.export.sparse_models import plain_sparse_model, sparse_model
from tests.models import VOCAB, tiny_model

ROWS, SIZE, STEPS = 4, 16, 5
DECAY, RATE, CLIP, BETAS, EPS = 0.1, 3e-3, 0.5, (0.9, 0.999), 1e-8


def rows(count: int = ROWS) -> Dataset:
    ids = torch.randint(0, VOCAB, (count, SIZE), generator=torch.Generator().manual_seed(2)).tolist()
    labels = [[-100, *row[1:]] for row in ids]  # no token predicts the first one, and Trainer counts labels
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def trainer(
    model: nn.Module, out: Path, callback: Any = None, data: Any = None, eval_dataset: Any = None, **changes: Any
) -> Trainer:
    values: dict[str, Any] = dict(
        max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=RATE, weight_decay=DECAY, max_grad_norm=CLIP,
        use_cpu=True, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True, optim="adamw_torch",
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
    )  # fmt: skip
    callbacks = [callback or KeepSparsityCallback()]
    args = TrainingArguments(str(out), **{**values, **changes})
    return Trainer(model, args, train_dataset=data or rows(), eval_dataset=eval_dataset, callbacks=callbacks)


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """The pruned positions of every matrix in the decoder blocks, by name."""
    matrices = {
        name: p for name, p in model.named_parameters() if p.dim() == 2 and (".layers." in name or ".h." in name)
    }
    return {name: p.detach() == 0 for name, p in matrices.items()}


def decayed(name: str) -> bool:
    return not name.endswith("bias") and "norm" not in name and ".ln_" not in name


def slow_training(model: PreTrainedModel, norms: list[float]) -> None:
    """AdamW with decay and clipping, written out in float64; pruned weights are left out of everything."""
    pruned = zeros(model)
    ids, labels = (torch.tensor(rows()[key]) for key in ("input_ids", "labels"))
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(1, STEPS + 1):
        model.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        rate = RATE * (STEPS - step + 1) / STEPS  # the linear schedule
        with torch.no_grad():
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            for name, mask in pruned.items():
                gradients[name][mask] = 0
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
            norms.append(norm)
            for name, parameter in model.named_parameters():
                gradient = gradients[name] * min(1.0, CLIP / (norm + 1e-6))
                first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
                second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
                direction = first[name] / (1 - BETAS[0] ** step)
                scale = (second[name] / (1 - BETAS[1] ** step)).sqrt() + EPS
                shrunk = parameter * (1 - rate * DECAY) if decayed(name) else parameter
                parameter.copy_(shrunk - rate * direction / scale)
                if name in pruned:
                    parameter[pruned[name]] = 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_the_slow_loop_without_the_pruned_weights(family: str, accumulate: int, tmp_path: Path) -> None:
    model, twin = plain_sparse_model(family).double(), plain_sparse_model(family).double()
    pruned, start = zeros(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {"per_device_train_batch_size": ROWS // accumulate, "gradient_accumulation_steps": accumulate}
    run = trainer(model, tmp_path, **batch, gradient_checkpointing=accumulate == 2)
    run.train()
    norms: list[float] = []
    slow_training(twin.train(), norms)
    assert min(norms) > CLIP  # or clipping would not be seen
    assert [row["grad_norm"] for row in run.state.log_history if "grad_norm" in row] == pytest.approx(norms, rel=1e-6)
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-9), name
        assert not torch.equal(found, start[name]), name
    for name, mask in zeros(model).items():
        assert torch.equal(mask, pruned[name])
        state = run.optimizer.optimizer.state[model.get_parameter(name)]  # type: ignore[union-attr]
        assert not state["exp_avg"][mask].any() and not state["exp_avg_sq"][mask].any()


def test_without_the_callback_the_pattern_is_lost(tmp_path: Path) -> None:
    model = plain_sparse_model()
    trainer(model, tmp_path, callback=TrainerCallback()).train()
    assert not check_nm(model.get_parameter("model.layers.0.mlp.up_proj.weight"), 2, 4)


def test_optimizers_and_dtypes_that_move_pruned_weights(tmp_path: Path) -> None:
    class Rough(torch.optim.SGD):
        """Moves every weight."""

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.add_(0.01)

    model = plain_sparse_model().bfloat16()
    before = zeros(model)
    run = trainer(model, tmp_path)
    run.optimizer = Rough(model.parameters(), lr=0.1)
    run.train()
    assert all(torch.equal(mask, before[name]) for name, mask in zeros(model).items())


def test_mixed_precision_keeps_moments_of_pruned_weights_at_zero(tmp_path: Path) -> None:
    model = plain_sparse_model()
    before = zeros(model)
    run = trainer(model, tmp_path, bf16=True)
    run.train()
    for name, mask in zeros(model).items():
        state = run.optimizer.optimizer.state[model.get_parameter(name)]  # type: ignore[union-attr]
        assert torch.equal(mask, before[name]) and not state["exp_avg"][mask].any() and state["exp_avg"].any()


@pytest.mark.parametrize("pattern", ["1:4", "4:8"])
def test_the_pattern_of_the_folder_is_kept_and_its_export_is_exported_again(pattern: str, tmp_path: Path) -> None:
    model = sparse_model("llama", pattern=pattern)
    export_model(model, tmp_path / "start", "dense", dtype="float32")
    plain_model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    run = trainer(plain_model, tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "tuned"))
    report = export_model(tmp_path / "tuned", tmp_path / "out", "dense", dtype="float32", pattern=pattern)
    assert report.pruned.layers == 14 and report.nonzero_share == pytest.approx(
        eval(pattern.replace(":", "/")), abs=1e-3
    )


def test_a_tuned_compressed_export_is_compressed_again(tmp_path: Path) -> None:
    export_model(sparse_model(), tmp_path / "start", "compressed", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    run = trainer(model, tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "tuned"))
    export_model(tmp_path / "tuned", tmp_path / "out", "compressed", dtype="float32")
    found, expected = load_causal_lm(tmp_path / "out").state_dict(), model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def with_a_zero(model: PreTrainedModel) -> PreTrainedModel:
    """The model after a kept weight has become zero."""
    with torch.no_grad():
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        weight.view(-1)[int(weight.flatten().nonzero()[0])] = 0
    return model


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    class MakeZero(TrainerCallback):
        """A kept weight becomes zero in the step before the checkpoint, as rounding may do."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                with_a_zero(kwargs["model"])

    def run(out: Path) -> Trainer:
        made = trainer(plain_sparse_model(), out, data=rows(32), save_strategy="steps", save_steps=3, max_steps=6)
        made.add_callback(MakeZero())
        return made

    whole = run(tmp_path / "whole")
    whole.train()
    other = run(tmp_path / "other")
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    start = plain_sparse_model()
    expected = sum(int(mask.sum()) for mask in zeros(start).values()) + 1
    for model in (whole.model, other.model):
        assert model is not None
        assert sum(int(mask.sum()) for mask in zeros(model).values()) == expected
    pairs = zip(whole.model.parameters(), other.model.parameters(), strict=True)  # type: ignore[union-attr]
    assert all(torch.equal(one, two) for one, two in pairs)


def test_the_weights_of_the_best_checkpoint_have_the_same_zeros(tmp_path: Path) -> None:
    model = plain_sparse_model()
    before = zeros(model)
    every = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, max_steps=4)
    run = trainer(model, tmp_path, **every, load_best_model_at_end=True, greater_is_better=True, eval_dataset=rows())
    run.train()
    assert run.state.best_global_step == 2
    assert all(torch.equal(mask, before[name]) for name, mask in zeros(model).items())


def test_hooks_are_gone_after_training_and_after_an_error(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("stop")

    def hooks(model: nn.Module) -> Iterator[int]:
        for parameter in model.parameters():
            yield len(getattr(parameter, "_post_accumulate_grad_hooks", None) or {})

    model, callback = plain_sparse_model(), KeepSparsityCallback()
    run = trainer(model, tmp_path, callback)
    run.add_callback(Stop())
    with pytest.raises(RuntimeError, match="stop"):
        run.train()
    run.remove_callback(Stop)
    assert sum(hooks(model)) == 14
    run.train()
    assert sum(hooks(model)) == 0 and callback.kept is None


def test_a_change_that_the_optimizer_did_not_make_is_found(tmp_path: Path) -> None:
    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEPS:
                torch.nn.init.ones_(kwargs["model"].get_parameter("model.layers.1.mlp.up_proj.weight"))

    run = trainer(plain_sparse_model(), tmp_path)
    run.add_callback(Fill())
    with pytest.raises(UserError, match=r"`model\.layers\.1\.mlp\.up_proj` is no longer 2:4"):
        run.train()


def test_a_dense_or_compressed_or_masked_model_is_refused_in_one_line(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)

    def error(model: nn.Module) -> str:
        with pytest.raises(UserError) as caught:
            KeepSparsityCallback().on_train_begin(args, None, None, model=model)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "No layer of LlamaForCausalLM is 2:4" in error(tiny_model())
    assert "Train with SparseTrainer" in error(sparse_model())
    export_model(sparse_model(), tmp_path / "compressed", "compressed", dtype="float32")
    config = AstSparse24Config(dequantize=False)
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed", quantization_config=config)
    assert "Load the model without `dequantize=False`" in error(compressed)
    export_model(sparse_model(), tmp_path / "dense", "dense", dtype="float32")
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.nn.init.ones_(changed.get_parameter("model.layers.1.mlp.up_proj.weight"))
    assert "`model.layers.1.mlp.up_proj` is recorded as pruned, but its weight is not 2:4" in error(changed)
    args.deepspeed_plugin = object()  # `accelerate launch` may choose DeepSpeed too
    assert "DeepSpeed and FSDP1 flatten weights" in error(plain_sparse_model())
