"""FLOPs of student and teacher in the log, and `distillation.match_flops` (Table 11)."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, TrainerCallback

from ast_sparse import DistillationConfig, SLoRBConfig, SparseTrainer, SparsityConfig
from ast_sparse.cli.train import main
from ast_sparse.errors import UserError
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.training.callbacks.flops import student_parameters, teacher_parameters
from tests.models import VOCAB, generated_text, save_tiny_model, tiny_config, tiny_model
from tests.training.small_runs import arguments, blocks, trainer, weights

MATCHED = DistillationConfig(alpha=0.0, match_flops=True)
TOKENS = 4 * 16  # of a step


def size(model: Any) -> int:
    return model.num_parameters(exclude_embeddings=True) + VOCAB * 32  # the head, which has the embedding's weight


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_head_costs_as_much_as_one_of_its_own(tmp_path: Path, family: str) -> None:
    found = []
    for tied in (True, False):
        config = tiny_config(family)
        config.tie_word_embeddings = tied
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        config.save_pretrained(tmp_path)
        found += [student_parameters(model, SparsityConfig(), None)]
        found += [teacher_parameters(model), teacher_parameters(str(tmp_path))]
    assert found == [size(tiny_model(family))] * 6


def flops(run: SparseTrainer) -> list[tuple[float, float]]:
    return [(log["student_flops"], log["teacher_flops"]) for log in run.state.log_history if "student_flops" in log]


def test_a_teacher_whose_configuration_is_impossible_is_named(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 0}))
    with pytest.raises(
        UserError, match=r"^model\.teacher=.*: The model .* cannot be built: .*Check its config\.json\.$"
    ):
        teacher_parameters(str(tmp_path))


def test_without_a_teacher_a_run_gets_a_third_more_steps(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=7, warmup_steps=0.5)
    run = SparseTrainer(tiny_model(), args, distillation_config=MATCHED, train_dataset=blocks())
    run.train()
    assert run.args.max_steps == run.state.global_step == 10  # 28/3 rounded up
    assert args.max_steps == 7  # the caller's arguments, maybe used for another run, did not change
    rates = [log["learning_rate"] for log in run.state.log_history if "learning_rate" in log]
    assert rates.index(max(rates)) == 5  # the warm-up is a share of the steps


def test_a_model_saved_between_two_log_records_has_all_its_tokens(tmp_path: Path) -> None:
    found = []

    class Saves(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found.append(run.sparsity_config_dict()["trained"])

    run = trainer(tmp_path, args=dict(max_steps=3, logging_steps=100))
    run.add_callback(Saves())
    run.train()
    found.append(run.sparsity_config_dict()["trained"])
    assert found == [{"steps": step, "tokens": step * TOKENS} for step in (1, 2, 3, 3)]


def test_steps_of_an_interrupted_training_do_not_count_in_the_next(tmp_path: Path) -> None:
    class Interrupts(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    settings = dict(max_steps=2, logging_steps=100, save_strategy="steps", save_steps=2)
    run = trainer(tmp_path, args=settings, callbacks=[Interrupts()])
    for resumed in (None, str(tmp_path / "checkpoint-2")):  # which is finished: it is loaded without a step
        with pytest.raises(KeyboardInterrupt):
            run.train()
        run.remove_callback(Interrupts)
        run.train(resume_from_checkpoint=resumed)
        assert run.sparsity_config_dict()["trained"] == {"steps": 2, "tokens": 2 * TOKENS}
        assert flops(run)[0][0] == 6.0 * 2 * TOKENS * size(tiny_model())
        run.add_callback(Interrupts())


@pytest.mark.parametrize(("epochs", "steps"), [(1, 8), (3, 24), (0.5, 4)])
def test_epochs_become_more_like_steps(tmp_path: Path, epochs: float, steps: int) -> None:
    args = dict(max_steps=-1, num_train_epochs=epochs)
    run = trainer(tmp_path, distillation_config=MATCHED, train_dataset=blocks(count=24), args=args)  # 6 steps each
    run.train()
    assert run.state.global_step == steps


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_slorb_counts_as_the_student_and_a_named_teacher_as_it_is(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    config.num_hidden_layers = 5
    teacher = AutoModelForCausalLM.from_config(config)
    teacher.config.save_pretrained(tmp_path / "teacher")  # its configuration is enough
    model = tiny_model(family)
    dense = size(model)
    for given in (teacher, str(tmp_path / "teacher"), None):
        run = trainer(
            tmp_path, tiny_model(family), distillation_config=MATCHED, teacher_model=given, slorb_config=SLoRBConfig(),
            args=dict(max_steps=1000),
        )  # fmt: skip
        slorb = sum(p.numel() for layer in sparse_layers(run.model).values() for p in layer.slorb.parameters())
        other = dense if given is None else size(teacher)
        assert run.args.max_steps == math.ceil(1000 * (1 + other / (3 * (dense + slorb))))
        assert run.teacher is None


@pytest.mark.parametrize("slorb", [None, SLoRBConfig()])
@pytest.mark.parametrize("layers", [2, 3])
def test_flops_of_student_and_teacher_are_logged_at_the_end(
    tmp_path: Path, slorb: SLoRBConfig | None, layers: int
) -> None:
    config = tiny_config("llama")
    config.num_hidden_layers = layers
    teacher = AutoModelForCausalLM.from_config(config)
    run = trainer(tmp_path, slorb_config=slorb, teacher_model=teacher, args=dict(gradient_accumulation_steps=2))
    run.train()
    tokens = 6 * 2 * TOKENS
    student = size(tiny_model()) + (
        0 if slorb is None else sum(p.numel() for name, p in run.model.named_parameters() if ".slorb." in name)
    )
    assert flops(run) == [(6.0 * tokens * student, 2.0 * tokens * size(teacher))]


def test_without_a_teacher_its_flops_are_zero_and_equal_flops_are_equal(tmp_path: Path) -> None:
    alone = trainer(tmp_path, distillation_config=MATCHED)
    alone.train()
    taught = trainer(tmp_path)
    taught.train()
    assert flops(alone)[0][1] == 0
    assert flops(alone)[0][0] == pytest.approx(sum(flops(taught)[0]), rel=1e-12)


def test_a_resumed_run_ends_at_the_same_step_with_the_same_weights_and_flops(tmp_path: Path) -> None:
    def run(folder: Path, resume: str | None = None) -> SparseTrainer:
        made = trainer(
            folder, sparsity=SparsityConfig(mask_interval=3), distillation_config=MATCHED,
            args=dict(save_strategy="steps", save_steps=3),
        )  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run(tmp_path / "whole")
    assert len(flops(whole)) == 1
    for step in (3, 6, 8):  # 8: the run was finished, and stopped before the final save
        again = run(tmp_path / f"from-{step}", str(tmp_path / f"whole/checkpoint-{step}"))
        assert again.state.global_step == 8 and flops(again) == flops(whole)
        expected = weights(whole.model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


def test_a_checkpoint_that_counted_fewer_parameters_keeps_its_tokens(tmp_path: Path) -> None:
    settings = dict(max_steps=2, save_strategy="steps", save_steps=1)
    whole = trainer(tmp_path, args=settings)
    whole.train()
    for step in (1, 2):
        path = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps({**state, "total_flos": state["total_flos"] * 0.7}))  # without the tied head
        again = trainer(tmp_path, args=settings)
        again.train(resume_from_checkpoint=str(path.parent))
        assert again.sparsity_config_dict()["trained"] == {"steps": 2, "tokens": 2 * TOKENS}
        assert flops(again)[-1:] == flops(whole)


class Tracker(TrainerCallback):
    """Notes what a tracker is told; Trainer calls it before the callbacks of SparseTrainer."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.told.append("flops" if "student_flops" in logs else "log")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append("end")


def test_a_tracker_gets_the_flops_before_it_is_closed_and_is_not_opened_for_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Tracker(), Tracker()
    settings = dict(max_steps=1, save_strategy="steps", save_steps=1)
    trainer(tmp_path, callbacks=[first], args=settings).train()
    assert first.told[-2:] == ["flops", "end"] and first.told.count("flops") == 1
    again = trainer(tmp_path, callbacks=[second], args=settings)
    monkeypatch.setattr(again, "is_world_process_zero", lambda: False)  # the checkpoint has the state of the first one
    again.train(resume_from_checkpoint=True)
    assert second.told == [] and not again.state.is_world_process_zero and len(flops(again)) == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("student_flops") == 1


def test_the_plan_and_the_run_say_how_many_steps_there_are(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(generated_text(100))
    tree = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "text.txt"), "eval_share": 0.1, "block_size": 16},
        "distillation": {"alpha": 0, "match_flops": True},
        "sparsity": {"schedule": "imp", "rounds": 4},  # for the four steps, not the three that are set
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / "out")]
    for options in (["--dry-run"], []):
        result = CliRunner().invoke(main, [*arguments, *options])
        assert result.exit_code == 0, result.output
        assert "steps: training.max_steps=3 becomes 4: distillation.match_flops adds the steps" in result.output
        assert "tokens: 4 steps x 32 tokens per step = 128" in result.output
    assert '"global_step": 4' in (tmp_path / "out/trainer_state.json").read_text()
