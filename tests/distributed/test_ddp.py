"""Two gloo ranks under torchrun train as one process does."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ast_sparse.training.resume.checkpoints import checkpoint_folders, faults
from tests.models import generated_text, save_tiny_model
from tests.processes import Started, run_command

CONFIG = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/text.jsonl, eval_share: 0.1, block_size: 32}}
sparsity: {{mask_interval: {interval}, mask_decay: 1e-2}}
distillation: {{kind: {kind}}}
training:
  max_steps: 8
  per_device_train_batch_size: {batch}
  gradient_accumulation_steps: 2
  learning_rate: 1e-3
  logging_steps: 1
  save_steps: 4
  use_cpu: true
  report_to: none
evaluation: {{datasets: [heldout, {folder}/even.jsonl], windows: 3, steps: 8}}
"""


def command(folder: Path, ranks: int, interval: int, kind: str = "kl") -> list[str]:
    config = folder / f"run_{ranks}_{interval}_{kind}.yaml"
    config.write_text(CONFIG.format(folder=folder, interval=interval, batch=4 // ranks, kind=kind))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "ast_sparse.cli.train", "--config", str(config)]


def train(folder: Path, ranks: int, interval: int, *options: str, kind: str = "kl") -> Path:
    out = folder / f"out_{ranks}_{interval}_{kind}"
    started = [*command(folder, ranks, interval, kind), "--output-dir", str(out), *options]
    finished = run_command(started)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return out


def logged(out: Path, key: str) -> list[float]:
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in log if key in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    save_tiny_model(folder / "model")
    documents = [{"text": generated_text(12, seed=seed)} for seed in range(40)]
    for name, part in (("text", documents), ("even", documents[::2]), ("odd", documents[1::2])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in part))
    return folder


DOMAINS = "{{even: {{train: {folder}/even.jsonl, target: 1.0}}, odd: {{train: {folder}/odd.jsonl, target: 0.5}}}}"
MIXTURE = (
    "data.train=null", "data.update={type: doremi}", "training.eval_strategy=steps", "training.eval_steps=2",
    "training.per_device_eval_batch_size=2",
)  # fmt: skip


@pytest.mark.parametrize(("kind", "is_mixture"), [("kl", True), ("tinybert", False)])
def test_two_ranks_follow_one_process_with_fixed_masks(folder: Path, kind: str, is_mixture: bool) -> None:
    few_records = ("training.logging_steps=3",)  # two steps follow the last one
    settings = [*MIXTURE, f"data.domains={DOMAINS.format(folder=folder)}"] if is_mixture else few_records
    options = [part for setting in settings for part in ("--set", setting)]
    one, two = (train(folder, ranks, 0, *options, kind=kind) for ranks in (1, 2))
    for key in ("loss", "train_loss"):
        assert logged(two, key) == pytest.approx(logged(one, key), abs=1e-5)
    if is_mixture:  # rows of the last held-out batch are distributed unevenly
        for key in ("eval_even_loss", "eval_odd_loss", "domain_share/odd", "domain_loss/even", "domain_epoch/odd"):
            assert len(logged(one, key)) >= 4 and logged(two, key) == pytest.approx(logged(one, key), abs=1e-5)
    key = "heldout_perplexity"
    assert logged(two, key) == pytest.approx(logged(one, key), rel=1e-5) and len(logged(one, key)) == 1
    stages, shared = (json.loads((out / "results.json").read_text()) for out in (one, two))
    for stage, results in stages.items():
        for name, result in results.items():
            found, tolerance = shared[stage][name], 1e-5 if stage.startswith("retrained") else 1e-6
            assert found["perplexity"] == pytest.approx(result["perplexity"], rel=tolerance)
            assert found["windows"] == result["windows"] == 3
            assert found["predicted_tokens"] == result["predicted_tokens"]
    assert len(stages) == 3
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=2e-5)


def test_two_ranks_end_sparse_with_moving_masks_and_resume(folder: Path) -> None:
    late_slorb = ("--set", "slorb.k=16", "--set", "slorb.start=0.5")  # drops gradients that DDP has averaged
    out = train(folder, 2, 2, *late_slorb)
    weights = load_file(out / "model.safetensors")
    layers = json.loads((out / "sparsity_config.json").read_text())["layers"]
    assert all((weights[f"{name}.weight"] == 0).float().mean() == 0.5 for name in layers)
    (out / "checkpoint-8" / "trainer_state.json").unlink()  # as if killed inside the last save
    train(folder, 2, 2, *late_slorb, "--resume")
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    other = [*command(folder, 2, 3), "--output-dir", str(out), *late_slorb, "--resume"]
    errors = run_command(other).stderr.splitlines()
    said = [line for line in errors if line.startswith("Error: ")]  # both ranks find it
    assert len(said) == 1 and "sparsity.mask_interval=3 differs from 2" in said[0]


def test_ranks_skip_the_same_step_and_save_the_same_step_when_one_gets_a_signal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIDS", str(tmp_path))
    out = tmp_path / "out"
    started = [part.replace("ast_sparse.cli.train", "tests.distributed.troubled") for part in command(folder, 2, 2)]
    for setting in ("training.max_steps=5000", "training.save_strategy=no", "watch.nan=skip"):
        started += ["--set", setting]
    launcher = Started([*started, "--output-dir", str(out)])
    while not (out / "mask_history.jsonl").exists() and launcher.poll() is None:
        time.sleep(0.01)
    assert (tmp_path / "0").exists()
    os.kill(int((tmp_path / "1").read_text()), signal.SIGUSR1)
    _, errors = launcher.communicate(timeout=120)
    (saved,) = checkpoint_folders(out)
    assert launcher.returncode != 0 and f"saved {saved}; --resume continues from there" in errors, errors
    assert sorted(path.name for path in saved.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert faults(saved) == []
    kept = sorted(path.name for path in (out / "replay").iterdir())
    assert kept == ["step-2-rank-0.safetensors", "step-2-rank-1.safetensors"]
    log = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    assert [entry["skipped_steps"] for entry in log if "loss" in entry][:2] == [0, 1]
    assert all(torch.isfinite(tensor).all() for tensor in load_file(saved / "model.safetensors").values())
