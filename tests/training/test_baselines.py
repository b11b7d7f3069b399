"""IMP and GMP end in the exact pattern, and patterns other than 2:4 hold; SLoRB after the sparse training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from ast_sparse import DistillationConfig, SLoRBConfig, SparseTrainer, SparsityConfig, UserError, export_model
from ast_sparse.sparsity.model import sparse_layers
from tests.models import VOCAB, tiny_config, tiny_model
from tests.training.small_runs import arguments, blocks, trainer, weights

STEPS = 7


class Watch(TrainerCallback):
    """Masks after each step."""

    def __init__(self) -> None:
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = sparse_layers(kwargs["model"])
        self.masks.append({name: layer.mask.clone() for name, layer in layers.items()})
        for layer in layers.values():
            assert not layer.masked_weight()[~layer.mask].any()


def pruned_counts(masks: dict[str, torch.Tensor], share: float) -> dict[str, int]:
    return {name: round(share * mask.numel()) for name, mask in masks.items()}


def wide_model(family: str) -> PreTrainedModel:
    """A model in which every width is a multiple of 32."""
    config = tiny_config(family)
    if family == "llama":
        config.intermediate_size = 64
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def imp(rounds: int = 3, **kwargs: Any) -> SparsityConfig:
    return SparsityConfig(schedule="imp", rounds=rounds, **kwargs)


def gmp(prune_until: float = 1.0, **kwargs: Any) -> SparsityConfig:
    return SparsityConfig(schedule="gmp", mask_interval=3, prune_until=prune_until, **kwargs)


# shares of the weights that are pruned after steps 1 to 7, of the half that 2:4 prunes
ROUNDS = [1 - 0.5 ** (i / 3) for i in (1, 2, 2, 3, 3, 3, 3)]  # a round is 7 // 3 = 2 steps
RAMP = [0.5 * (1 - (1 - step / 7) ** 3) for step in (0, 0, 3, 3, 3, 6, 7)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize(("sparsity", "shares"), [(imp(), ROUNDS), (gmp(), RAMP)], ids=["imp", "gmp"])
def test_sparsity_follows_its_schedule_and_ends_exactly_in_the_pattern(
    tmp_path: Path, family: str, distilled: bool, sparsity: SparsityConfig, shares: list[float]
) -> None:
    watch = Watch()
    run = trainer(
        tmp_path, tiny_model(family), sparsity, args=dict(max_steps=STEPS, weight_decay=0.1), callbacks=[watch],
        distillation_config=DistillationConfig(alpha=0.67) if distilled else None,
        slorb_config=SLoRBConfig() if distilled else None,
    )  # fmt: skip
    start = {name: layer.mask.clone() for name, layer in sparse_layers(run.model).items()}
    run.train()
    before = start
    assert {name: int((~mask).sum()) for name, mask in start.items()} == pruned_counts(
        start, ROUNDS[0] if sparsity.schedule == "imp" else 0.0
    )
    # the watch is called before the masks are refreshed, so it sees the share of the step before
    for share, masks in zip([shares[0] if sparsity.schedule == "imp" else 0.0, *shares], watch.masks, strict=False):
        assert {name: int((~mask).sum()) for name, mask in masks.items()} == pruned_counts(masks, share)
        assert not any((mask & ~before[name]).any() for name, mask in masks.items())
        before = masks
    logged = [(log["step"], log["sparsity"]) for log in run.state.log_history if "sparsity" in log]
    steps = [2, 4] if sparsity.schedule == "imp" else [3, 6, 7]
    assert [step for step, _ in logged] == steps
    assert [share for _, share in logged] == pytest.approx([shares[step - 1] for step in steps], abs=1e-3)
    for layer in sparse_layers(run.model).values():
        groups = layer.weight.movedim(layer.group_dim, -1).unflatten(-1, (-1, 4))
        assert ((groups != 0).sum(-1) == 2).all()
    export_model(run.model, tmp_path / "out", "compressed", dtype="float32")


@pytest.mark.parametrize("sparsity", [imp(rounds=1), gmp(prune_until=0.3), imp(rounds=2, prune_share=0.9)])
def test_imp_and_gmp_end_in_the_pattern_with_any_settings(tmp_path: Path, sparsity: SparsityConfig) -> None:
    run = trainer(tmp_path, tiny_model("gpt2"), sparsity, args=dict(max_steps=STEPS))
    run.train()
    export_model(run.model, tmp_path / "out", "compressed")


@pytest.mark.parametrize("sparsity", [imp(), gmp()], ids=["imp", "gmp"])
def test_a_run_that_is_stopped_early_is_pruned_to_its_pattern(tmp_path: Path, sparsity: SparsityConfig) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 1

    run = trainer(tmp_path, tiny_model("llama"), sparsity, callbacks=[Stop()])
    run.train()
    assert run.state.global_step == 1
    export_model(run.model, tmp_path / "out", "compressed")


def test_imp_and_gmp_are_trained_by_plain_adamw(tmp_path: Path) -> None:
    """One step from a start where everything is kept: `torch.optim.AdamW` on the cross-entropy."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    data = blocks(count=4)
    args = dict(max_steps=2, max_grad_norm=0.0, weight_decay=0.1, lr_scheduler_type="constant")
    run = trainer(
        tmp_path, model, SparsityConfig(schedule="gmp", mask_interval=2, mask_decay=1.0), train_dataset=data,
        distillation_config=None, args=args,
    )  # fmt: skip
    watched: list[dict[str, torch.Tensor]] = []

    class First(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watched.append(weights(kwargs["model"]))

    run.add_callback(First())
    run.train()
    no_decay = [p for name, p in plain.named_parameters() if "norm" in name]
    rest = [p for name, p in plain.named_parameters() if "norm" not in name]
    groups = [{"params": rest}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)
    ids = torch.tensor(data["input_ids"])
    for seen in watched[:2]:  # masks change after the second update
        optimizer.zero_grad()
        plain(ids, labels=ids).loss.backward()
        optimizer.step()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(seen[name], parameter, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("sparsity", [imp(), gmp()], ids=["imp", "gmp"])
def test_imp_and_gmp_resume_bit_identically(tmp_path: Path, sparsity: SparsityConfig) -> None:
    def run(folder: Path, resume: Path | None = None) -> SparseTrainer:
        made = trainer(
            folder, tiny_model("llama"), sparsity, args=dict(max_steps=STEPS, save_strategy="steps", save_steps=1)
        )
        made.train(resume_from_checkpoint=None if resume is None else str(resume))
        return made

    whole = run(tmp_path / "whole")
    expected = weights(whole.model)
    for step in (3, 5):
        again = run(tmp_path / f"from-{step}", tmp_path / f"whole/checkpoint-{step}")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
        history = [log for log in again.state.log_history if "sparsity" in log]
        assert history == [log for log in whole.state.log_history if "sparsity" in log]


@pytest.mark.parametrize(
    ("sparsity", "slorb"),
    [(imp(), None), (gmp(), None), (SparsityConfig(mask_interval=2), SLoRBConfig(k=16, start=0.5))],
    ids=["imp", "gmp", "slorb"],
)
@pytest.mark.parametrize("steps", [3, 9])
def test_a_resume_of_another_length_is_refused_if_past_steps_depend_on_it(
    tmp_path: Path, sparsity: SparsityConfig, slorb: SLoRBConfig | None, steps: int
) -> None:
    args = dict(max_steps=STEPS, save_strategy="steps", save_steps=4)
    trainer(tmp_path / "whole", None, sparsity, slorb_config=slorb, args=args).train()
    again = trainer(tmp_path / "again", None, sparsity, slorb_config=slorb, args={**args, "max_steps": steps})
    with pytest.raises(UserError, match=rf"training\.max_steps={steps} differs from the 7 steps"):
        again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))


@pytest.mark.parametrize("pattern", ["unstructured", "1:2", "4:8", "8:16", "16:32"])
@pytest.mark.parametrize("schedule", ["constant", "gmp"])
def test_other_patterns_hold_after_training_and_in_the_dense_export(
    tmp_path: Path, pattern: str, schedule: Any
) -> None:
    family = "gpt2" if schedule == "gmp" else "llama"
    sparsity = SparsityConfig(pattern=pattern, schedule=schedule, mask_interval=2, mask_decay=1e-2)
    run = trainer(tmp_path, wide_model(family), sparsity, args=dict(max_steps=4))
    start = {name: layer.mask.clone() for name, layer in sparse_layers(run.model).items()}
    run.train()
    for name, layer in sparse_layers(run.model).items():
        assert int(layer.mask.sum()) * 2 == layer.mask.numel() and not torch.equal(layer.mask, start[name])
        assert not layer.weight[~layer.mask].any()
        if pattern != "unstructured":
            n, m = map(int, pattern.split(":"))
            assert (layer.mask.movedim(layer.group_dim, -1).unflatten(-1, (-1, m)).sum(-1) == n).all()
    report = export_model(run.model, tmp_path / "out", "dense", dtype="float32")
    assert report.pattern == pattern
    ids = torch.randint(0, VOCAB, (2, 16))
    run.model.eval()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(exported(ids).logits, run.model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sparsity", "slorb", "args", "message"),
    [
        (imp(rounds=4, steps_per_round=1000), None, {}, r"sparsity\.rounds=4 of sparsity\.steps_per_round=1000 need"),
        (imp(rounds=4, steps_per_round=2), None, {}, r"more than the 6 steps of the run\. Lower one of them"),
        (imp(rounds=8), None, {}, r"sparsity\.rounds=8 need more than the 6 steps of the run\. Lower it"),
        (gmp(), None, dict(load_best_model_at_end=True), r"load_best_model_at_end=True with sparsity\.schedule=gmp"),
        (gmp(0.75), SLoRBConfig(start=0.5), {}, r"slorb\.start=0\.5 begins SLoRB after 3 steps, before .*=gmp"),
        (imp(), SLoRBConfig(start=0.5), {}, r"slorb\.start=0\.5 begins SLoRB after 3 steps, before .*=imp"),
    ],
)  # fmt: skip
def test_a_run_too_short_for_its_pattern_is_refused_at_the_beginning(
    tmp_path: Path, sparsity: SparsityConfig, slorb: SLoRBConfig | None, args: dict[str, Any], message: str
) -> None:
    if args:
        args = dict(args, eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2)
    with pytest.raises(UserError, match=message) as refusal:
        trainer(tmp_path / "run", sparsity=sparsity, slorb_config=slorb, args=args, eval_dataset=blocks(4))
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


def test_imp_whose_last_round_begins_with_the_last_step_is_allowed(tmp_path: Path) -> None:
    run = trainer(tmp_path, sparsity=imp(rounds=4, steps_per_round=2), args=dict(max_steps=7))
    run.train()
    export_model(run.model, tmp_path / "out", "compressed")


def test_rounds_that_do_not_fit_into_the_epochs_are_refused_when_training_begins(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=1)  # 32 blocks in batches of 4: 8 steps
    run = SparseTrainer(tiny_model("llama"), args, sparsity_config=imp(rounds=9), train_dataset=blocks())
    with pytest.raises(UserError, match=r"sparsity\.rounds=9 need more than the 8 steps"):
        run.train()


# ---- SLoRB after the sparse training -----------------------------------------------------------------------------

LATE = SLoRBConfig(k=16, start=0.5)


def late_run(
    folder: Path, slorb: SLoRBConfig | None = LATE, resume: Path | None = None, **kwargs: Any
) -> SparseTrainer:
    args = dict(
        max_steps=7, save_strategy="steps", save_steps=1, weight_decay=0.1, max_grad_norm=0.05,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    run = trainer(
        folder, tiny_model(kwargs.pop("family", "llama")), SparsityConfig(mask_interval=1, mask_decay=1e-2), args=args,
        slorb_config=slorb, **kwargs,
    )  # fmt: skip
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    return run


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def late(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SparseTrainer]:
    """Seven steps, the last four (3 to 6) with SLoRB alone; a checkpoint after each."""
    folder = tmp_path_factory.mktemp("late")
    return folder, late_run(folder, family=request.param)


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}/model.safetensors")


def moments(folder: Path, step: int) -> dict[int, dict[str, torch.Tensor]]:
    return torch.load(folder / f"checkpoint-{step}/optimizer.pt", weights_only=True)["state"]


def test_until_slorb_begins_the_run_equals_one_without_it(late: tuple[Path, SparseTrainer], tmp_path: Path) -> None:
    folder, run = late
    late_run(tmp_path, None, family=run.model.config.model_type)
    plain, ours = checkpoint(tmp_path, 3), checkpoint(folder, 3)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.items())
    added = {name: tensor for name, tensor in ours.items() if name not in plain}
    assert {name.rpartition(".")[2] for name in added} == {"S", "X"}
    assert not any(tensor.any() for name, tensor in added.items() if name.endswith(".S"))
    for name, tensor in added.items():
        if name.endswith(".X"):
            assert torch.equal(tensor, torch.eye(len(tensor)).repeat_interleave(16, dim=1))


def test_slorb_begins_with_the_sums_of_what_is_pruned_at_that_step(
    late: tuple[Path, SparseTrainer], tmp_path: Path
) -> None:
    folder, finished = late
    seen: list[dict[str, torch.Tensor]] = []

    class Begin(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(weights(kwargs["model"]))
            control.should_training_stop = True

    late_run(tmp_path, resume=folder / "checkpoint-3", family=finished.model.config.model_type, callbacks=[Begin()])
    stored = checkpoint(folder, 3)
    for name, layer in sparse_layers(finished.model).items():
        weight, mask = (stored[f"{name}.{key}"].movedim(layer.group_dim, -1) for key in ("weight", "mask"))
        expected = (weight * ~mask).unflatten(1, (-1, 16)).sum(-1) / 16
        torch.testing.assert_close(seen[0][f"{name}.slorb.S"], expected, rtol=1e-5, atol=1e-8)
        assert expected.any()


def test_after_that_only_slorb_is_trained(late: tuple[Path, SparseTrainer]) -> None:
    folder, run = late
    before, after = checkpoint(folder, 3), checkpoint(folder, 7)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if ".slorb." in name}
    earlier, later = moments(folder, 3), moments(folder, 7)
    assert all(torch.equal(value, later[index][key]) for index in earlier for key, value in earlier[index].items())
    assert {float(later[index]["step"]) for index in later.keys() - earlier.keys()} == {4.0}
    assert len(later) - len(earlier) == len(moved)
    assert [log["step"] for log in run.state.log_history if "flip_rate" in log] == [1, 2, 3]
    norms = [log["grad_norm"] for log in run.state.log_history if "grad_norm" in log]
    assert len(norms) == 7 and max(norms[3:]) < min(norms[:3])  # frozen parameters are not in the clipped norm


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_resume_on_either_side_is_bit_identical(late: tuple[Path, SparseTrainer], tmp_path: Path, step: int) -> None:
    folder, run = late
    again = late_run(tmp_path, resume=folder / f"checkpoint-{step}", family=run.model.config.model_type)
    expected = weights(run.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
    mine, theirs = moments(tmp_path, 7), moments(folder, 7)
    assert all(torch.equal(value, mine[index][key]) for index in theirs for key, value in theirs[index].items())


def test_imp_before_slorb_ends_in_the_pattern_and_is_exported_with_its_adapter(tmp_path: Path) -> None:
    run = trainer(tmp_path, sparsity=imp(rounds=2, steps_per_round=2), slorb_config=LATE, args=dict(max_steps=7))
    run.train()
    export_model(run.model, tmp_path / "out", "compressed")
    assert (tmp_path / "out/slorb/adapter_config.json").is_file()
