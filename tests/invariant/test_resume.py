"""A run that is killed and resumed ends bit for bit like an uninterrupted one."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, TrainerState

from ast_sparse import DistillationConfig, SLoRBConfig, SparseTrainer, SparsityConfig
from ast_sparse.cli.train import main
from ast_sparse.errors import UserError
from ast_sparse.training.resume.best import find_best
from ast_sparse.training.resume.checkpoints import faults
from tests.models import VOCAB, generated_text, save_tiny_model, tiny_model
from tests.processes import Started, run_command
from tests.training.small_runs import arguments, blocks

# AST_SPARSE_KILL_STEPS=60 AST_SPARSE_KILL_SEEDS=20 python -m pytest tests/invariant/test_resume.py -k sigkill
STEPS = int(os.environ.get("AST_SPARSE_KILL_STEPS", "24"))  # a multiple of 12
SEEDS = int(os.environ.get("AST_SPARSE_KILL_SEEDS", "2"))

CONFIG = """
model:
  name_or_path: {folder}/model
data:
  train: {folder}/text.jsonl
  eval_share: 0.1
  block_size: 32
sparsity: {{mask_interval: 3, mask_decay: 1e-2}}
slorb: {{k: 16}}
training:
  max_steps: {steps}
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 3e-3
  weight_decay: 0.1
  logging_steps: 1
  save_steps: 4
  eval_strategy: steps
  eval_steps: 8
  use_cpu: true
  report_to: none
"""


def final_state(folder: Path) -> dict[str, Any]:
    """Weights, masks and SLoRB of the last checkpoint, and everything in the optimizer's state."""
    last = folder / f"checkpoint-{STEPS}"
    state = load_file(last / "model.safetensors")
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    return {**state, **{f"optimizer.{i}.{k}": v for i, entry in optimizer.items() for k, v in entry.items()}}


def assert_same_run(one: Path, other: Path) -> None:
    expected, got = final_state(one), final_state(other)
    assert expected.keys() == got.keys() and any(key.endswith(".mask") for key in expected)
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    history = [(folder / "mask_history.jsonl").read_text() for folder in (one, other)]
    assert history[0] == history[1] and len(history[0].splitlines()) == STEPS // 3
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for stage, row in results[0].items():
        assert row["heldout"]["perplexity"] == results[1][stage]["heldout"]["perplexity"]


def command(config: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "ast_sparse.cli.train", "--config", str(config), "--output-dir", str(out), *options]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("run")
    save_tiny_model(folder / "model", "gpt2")
    documents = [{"text": generated_text(12, seed=seed)} for seed in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder, steps=STEPS))
    run_command(command(folder / "run.yaml", folder / "whole"), check=True)
    return folder / "run.yaml", folder / "whole"


def newest_step(out: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in out.glob("checkpoint-*")), default=0)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_sigkill_at_a_random_moment_changes_nothing(undisturbed: tuple[Path, Path], tmp_path: Path, seed: int) -> None:
    config, whole = undisturbed
    rng, out = random.Random(seed), tmp_path / "out"
    for kill in range(2):
        target = newest_step(out) + rng.randint(1, STEPS // 3)
        process = Started(command(config, out, *(["--resume"] if newest_step(out) else [])))
        while newest_step(out) < target and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * rng.choice([0.05, 0.5]))  # during the save, or in the steps after it
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kill or process.returncode == -signal.SIGKILL
    resumed = run_command(command(config, out, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(whole, out)


@pytest.mark.parametrize(("name", "options"), [("SIGTERM", []), ("SIGUSR1", ["--set", "training.save_strategy=no"])])
def test_a_run_that_gets_a_signal_saves_its_step_and_resumes_bit_for_bit(
    undisturbed: tuple[Path, Path], tmp_path: Path, name: str, options: list[str]
) -> None:
    config, whole = undisturbed
    out = tmp_path / "out"
    process = Started(command(config, out, *options))
    while not (out / "mask_history.jsonl").exists() and process.poll() is None:
        time.sleep(0.001)  # until the first refresh, after step 3
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    saved = out / f"checkpoint-{newest_step(out)}"
    assert errors.splitlines()[-1] == f"{name}: saved {saved}; --resume continues from there."
    assert 3 <= newest_step(out) < STEPS and not faults(saved) and not (out / "model.safetensors").exists()
    resumed = CliRunner().invoke(main, ["--config", str(config), "--output-dir", str(out), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert_same_run(whole, out)


def test_resuming_a_run_killed_after_its_last_step_only_saves(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = undisturbed
    out = tmp_path / "out"
    run_command(command(config, out), check=True)
    (out / "model.safetensors").unlink()
    run_command(command(config, out, "--resume"), check=True)
    assert newest_step(out) == STEPS
    assert_same_run(whole, out)


def test_resuming_an_earlier_checkpoint_removes_the_later_ones(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = undisturbed
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / f"checkpoint-{STEPS}" / "optimizer.pt").write_bytes(b"of another course")
    resumed = run_command(command(config, out, "--resume", str(out / f"checkpoint-{STEPS - 8}")))
    assert resumed.returncode == 0, resumed.stderr
    assert f"checkpoint-{STEPS} is removed" in resumed.stderr
    assert_same_run(whole, out)


def with_best(folder: Path, resume: bool = False, **args: Any) -> SparseTrainer:
    """A run that ends with its best checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, **args}
    trainer = SparseTrainer(
        tiny_model("llama"),
        arguments(
            folder, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, **settings
        ),
        sparsity_config=SparsityConfig(mask_interval=2),
        train_dataset=blocks(),
        eval_dataset=blocks(count=4, seed=7),
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.best_global_step < 6  # the loss falls, and here the largest counts as best
    return trainer


def same_weights(one: SparseTrainer, other: SparseTrainer) -> bool:
    weights = one.model.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in other.model.state_dict().items())


def test_a_finished_run_that_is_resumed_ends_with_its_best_checkpoint(tmp_path: Path) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    first = with_best(out)
    assert same_weights(with_best(out, resume=True), first)
    out.rename(moved)
    again = with_best(moved, resume=True)
    assert same_weights(again, first)
    again.state.best_global_step = 5  # a better loss at a step without a checkpoint
    again._load_best_model()
    assert again.sparsity_config_dict()["trained"] == {"steps": first.state.best_global_step}
    shutil.rmtree(moved / f"checkpoint-{first.state.best_global_step}")
    with pytest.raises(UserError, match=r"best checkpoint '.*out/checkpoint-\d' has no weights. Put it back, or"):
        with_best(moved, resume=True)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_a_run_that_is_resumed_under_another_path_keeps_its_best_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    settings = {"save_strategy": strategy, "save_total_limit": 1}
    monkeypatch.chdir(tmp_path)
    first = with_best(Path("out"), **settings)
    assert [path.name for path in Path("out").glob("checkpoint-*")] == [f"checkpoint-{first.state.best_global_step}"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # so the path in the state leads nowhere
    again = with_best(tmp_path / "out", resume=True, **settings)
    assert again.state.best_model_checkpoint == str(tmp_path / "out" / f"checkpoint-{first.state.best_global_step}")
    assert same_weights(again, first)


def test_the_best_checkpoint_of_a_moved_run_is_not_that_of_the_best_loss(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    written = TrainerState(best_model_checkpoint="/elsewhere/checkpoint-2", best_global_step=3)
    written.save_to_json(str(tmp_path / "checkpoint-4" / "trainer_state.json"))
    state = TrainerState(best_global_step=3)  # as Trainer leaves it if the path leads nowhere
    find_best(state, tmp_path / "checkpoint-4")
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_a_mixture_of_experts_resumes_with_its_experts(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")  # experts are separate on disk

    def run(folder: Path, resume: str | None = None) -> SparseTrainer:
        trainer = SparseTrainer(
            str(tmp_path / "model"),
            arguments(folder, max_steps=4, save_strategy="steps", save_steps=2),
            sparsity_config=SparsityConfig(mask_interval=2),
            train_dataset=blocks(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole").model.state_dict()
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-2")).model.state_dict()
    assert any("experts" in name for name in whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("fixed", [False, True])
def test_resume_from_every_checkpoint_is_bit_identical(tmp_path: Path, fixed: bool) -> None:
    def run(folder: Path, resume: str | None = None) -> SparseTrainer:
        trainer = SparseTrainer(
            tiny_model("llama"),
            arguments(folder, max_steps=9, save_strategy="steps", save_steps=3, weight_decay=0.1),
            sparsity_config=SparsityConfig(mask_interval=0 if fixed else 2, mask_decay=1e-2),
            distillation_config=DistillationConfig(ce_weight=0.3, kl_weight=0.7, temperature=2.0),
            slorb_config=SLoRBConfig(k=16),
            train_dataset=blocks(count=16),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole")
    for step in (3, 6, 9):
        resumed = run(tmp_path / f"from_{step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 9
        state = resumed.model.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in whole.model.state_dict().items())
