"""Two gloo ranks under torchrun train as one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models import generated_text, save_tiny_model

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
"""


def train(folder: Path, ranks: int, interval: int, *options: str, kind: str = "kl") -> Path:
    config, out = folder / f"run_{ranks}_{interval}_{kind}.yaml", folder / f"out_{ranks}_{interval}_{kind}"
    config.write_text(CONFIG.format(folder=folder, interval=interval, batch=4 // ranks, kind=kind))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "ast_sparse.cli.train", "--config", str(config)]
    finished = subprocess.run([*command, "--output-dir", str(out), *options], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return out


def losses(out: Path) -> list[float]:
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    save_tiny_model(folder / "model")
    documents = [{"text": generated_text(12, seed=seed)} for seed in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


@pytest.mark.parametrize("kind", ["kl", "tinybert"])
def test_two_ranks_follow_one_process_with_fixed_masks(folder: Path, kind: str) -> None:
    one, two = train(folder, 1, 0, kind=kind), train(folder, 2, 0, kind=kind)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
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
