"""`training.bf16: auto`: what it becomes, on which machine, after which checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import TrainingArguments

from ast_sparse.cli.train import main
from ast_sparse.config.yaml12 import read_yaml
from ast_sparse.errors import UserError
from ast_sparse.kernels import bf16
from ast_sparse.run import precision
from ast_sparse.training.checks.arguments import check_arguments
from tests.models import generated_text, save_tiny_model

CONFIG = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/text.txt, block_size: 16, eval_share: 0}}
evaluation: {{datasets: []}}
training: {{max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1e-3, save_steps: 1, report_to: none,
  disable_tqdm: true, bf16: auto}}
"""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision")
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(generated_text(60))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def on_a_cpu(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    monkeypatch.setattr(bf16.setting, "capabilities", lambda: dict.fromkeys(features, True))


def train(folder: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["--config", str(folder / "run.yaml"), "--output-dir", str(out), *options])


def test_a_run_and_what_continues_it_on_another_machine(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "out", tmp_path / "out/config.yaml"
    on_a_cpu(monkeypatch, "avx512_bf16")
    result = train(folder, out)
    assert result.exit_code == 0, result.output
    line = "precision: bf16 autocast (training.bf16=auto: this CPU has avx512_bf16)"
    assert result.stdout.count("precision: ") == 1 and line in result.stdout
    resolved = read_yaml(config)["training"]  # enough to repeat the run
    assert resolved["bf16"] is True and resolved["use_cpu"] is True

    on_a_cpu(monkeypatch)
    again = train(folder, out, "--resume-if-started")
    assert again.exit_code == 0 and "nothing is left to do" in again.stdout
    record = out / "checkpoint-2/run.json"
    stored = json.loads(record.read_text())
    assert stored["settings"]["training"]["bf16"] is True
    resumed = train(folder, out, "--resume", "--dry-run")
    assert resumed.exit_code == 0, resumed.output
    assert f"precision: bf16 autocast (training.bf16=auto: {record.parent} was trained so)" in resumed.stdout
    refused = train(folder, out, "--resume", "--set", "training.bf16=false", "--set", "training.use_cpu=true")
    assert refused.exit_code == 2 and "training.bf16=False differs from True" in refused.stderr

    on_a_cpu(monkeypatch, "amx_bf16")
    stored["settings"]["training"]["bf16"] = False
    record.write_text(json.dumps(stored))
    resumed = train(folder, out, "--resume", "--dry-run")
    assert resumed.exit_code == 0 and "precision: float32 (training.bf16=auto: " in resumed.stdout
    record.unlink()
    resumed = train(folder, out, "--resume", "--dry-run")
    assert resumed.exit_code == 0 and "precision: float32 (training.bf16=auto: " in resumed.stdout
    assert "checkpoint-2 does not say)" in resumed.stdout


def test_a_plan_is_for_a_gpu_unless_the_cpu_trains(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_cpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planned = train(folder, tmp_path / "out", "--dry-run").stdout
    assert "precision: bf16 autocast (training.bf16=auto: planned for a GPU with bf16" in planned
    half = train(folder, tmp_path / "out", "--dry-run", "--set", "training.bf16=true").stdout
    assert "masked weights: a 16-bit copy of each is kept (sparsity.masked_weights=auto: the memory is enough)" in half
    memory = [[line for line in text.splitlines() if "GiB" in line] for text in (planned, half)]
    assert memory[0] and memory[0] == memory[1]
    assert "precision: float32" in train(folder, tmp_path / "out", "--dry-run", "--set", "training.use_cpu=true").stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("is_native", "expected"), [(True, "multiplies"), (False, "does not multiply")])
def test_a_gpu_that_only_emulates_bf16_stays_in_float32(
    monkeypatch: pytest.MonkeyPatch, is_native: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or is_native)
    assert bf16.multiplies_in_bf16(torch.device("cuda")) == (is_native, f"GPU {expected} in bf16")


def test_devices_that_are_not_known_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bf16.multiplies_in_bf16(torch.device("mps")) == (False, "unknown for the device mps")
    on_a_cpu(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert bf16.multiplies_in_bf16(CPU) == (False, "this PyTorch has no oneDNN")


def test_the_first_process_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ast_sparse.config import load_config

    on_a_cpu(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(precision, "gather", lambda mine: [(False, "as rank 0"), mine])
    config, line = precision.decide_bf16(load_config(folder / "run.yaml"), CPU, None, dry_run=False)
    assert config.training["bf16"] is False and line == "precision: float32 (training.bf16=auto: as rank 0)"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bf16=atuo", "training.bf16='atuo' is text, expected true or false or 'auto'."),
        ("fp16=true", "training.bf16='auto' and training.fp16=True exclude each other. Remove one of them."),
        ("bf16_full_eval=auto", "training.bf16_full_eval='auto' is text, expected true or false."),
    ],
)
def test_wrong_values_are_refused(folder: Path, tmp_path: Path, setting: str, message: str) -> None:
    result = train(folder, tmp_path / "out", "--set", f"training.{setting}")
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "out").exists()


def test_a_notebook_has_no_auto(tmp_path: Path) -> None:
    auto: Any = "auto"
    with pytest.raises(UserError, match=r"bf16='auto', which only configurations of ast-train know\. Set True"):
        check_arguments(TrainingArguments(str(tmp_path), bf16=auto, use_cpu=True, report_to="none"))
