"""ast-train --dry-run: the plan, before anything expensive runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transformers import TrainingArguments

from ast_sparse.cli.train import main
from ast_sparse.planning.batch import batch_line
from ast_sparse.planning.plan import Hardware
from tests.models import save_tiny_model

CONFIG = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/text.txt, block_size: 32}}
training: {{max_steps: 10, per_device_train_batch_size: 3, gradient_accumulation_steps: 2, bf16: true}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("two of four")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def dry_run(folder: Path, *options: str) -> Result:
    arguments = ["--config", str(folder / "run.yaml"), "--output-dir", str(folder / "out"), "--dry-run", *options]
    return CliRunner().invoke(main, arguments)


def test_dry_run_prints_the_plan_without_an_accelerator_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    result = dry_run(folder)
    assert result.exit_code == 0, result.output
    assert "2:4 on 14 layers: 15,360 of 19,616 parameters (78.3%)" in result.stdout
    assert "skipped  lm_head  (1): outside the decoder blocks" in result.stdout
    assert "tokens: 10 steps x 192 tokens per step = 1,920" in result.stdout
    assert "teacher" in result.stdout and "total" in result.stdout
    assert "73.60 GiB  92% of 80.0" in result.stdout
    chosen = "fast_forward: off (sparsity.fast_forward=auto: the run fits without recomputation, 0.0 of 73.6 GiB)"
    assert chosen in result.stdout
    assert sorted(folder.rglob("*")) == before


def test_tokens_flops_and_hours_follow_the_hardware_that_is_named(folder: Path) -> None:
    result = dry_run(folder, "--world-size", "4", "--peak-tflops", "1e-6", "--mfu", "0.5")
    assert "tokens: 10 steps x 768 tokens per step = 7,680" in result.stdout
    # 8 for each token and each of the 19,616 parameters: the head multiplies by the embedding's
    assert f"FLOPs: {8 * 19_616 * 768:.3g} per step, {8 * 19_616 * 7_680:.3g} in all" in result.stdout
    assert (
        f"time: {8 * 19_616 * 7_680 / (4 * 1e6 * 0.5) / 3600:,.1f} hours, if 50% of 4 x 1e-06 TFLOP/s" in result.stdout
    )
    assert "memory of each of 4 devices, DDP, at its peak, the forward and backward pass:" in result.stdout


def test_a_sharded_run_is_planned_on_a_machine_without_its_devices(folder: Path) -> None:
    result = dry_run(folder, "--world-size", "4", "--set", "training.fsdp=true")
    assert result.exit_code == 0, result.output
    assert "memory of each of 4 devices, FSDP2, at its peak, the " in result.stdout
    assert "  gathered " in result.stdout and "measurement of perplexities" in result.stdout
    assert "host memory of a machine with 4 processes" in result.stdout
    hybrid = "training.parallelism_config={dp_replicate_size: 2, dp_shard_size: 2}"
    options = ("--set", "training.fsdp=true", "--set", "evaluation.datasets=[]", "--set", hybrid)
    unmeasured = dry_run(folder, "--world-size", "4", *options)
    assert "FSDP2 in 2 pieces, 2 replicas, at its peak" in unmeasured.stdout
    assert "measurement" not in unmeasured.stdout
    refused = dry_run(folder, "--world-size", "8", *options)
    assert refused.exit_code == 2 and "8. Set dp_replicate_size: 4, or start 4 processes." in refused.stderr


def test_a_plan_refuses_what_its_processes_could_not_share(folder: Path) -> None:
    split = ("--set", "training.accelerator_config={split_batches: true}")
    refused = dry_run(folder, "--world-size", "4", *split)
    assert refused.exit_code == 2 and "split_batches=True: 4 processes would share a batch" in refused.stderr


def test_a_run_that_does_not_fit_ends_with_the_settings_that_fit(folder: Path) -> None:
    result = dry_run(folder, "--device-memory", "0.001", "--set", "training.per_device_train_batch_size=8")
    assert result.exit_code == 2
    assert "  total  " in result.stdout  # the plan is printed all the same
    assert result.stderr.count("\n") == 1 and "0.94 MiB can be used. It fits with training." in result.stderr
    settings = re.findall(r"(?:training|optimizer)\.\w+=\w+", result.stderr)
    fitted = dry_run(folder, "--device-memory", "0.001", *[part for each in settings for part in ("--set", each)])
    assert fitted.exit_code == 0, fitted.output
    hopeless = dry_run(folder, "--device-memory", "1e-6")
    assert hopeless.exit_code == 2 and "No settings make it fit" in hopeless.stderr


def test_a_folder_with_its_config_alone_is_enough_for_a_plan_and_not_for_a_run(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()
    assert "has none; a plan needs only its config.json" in dry_run(folder).stdout
    result = CliRunner().invoke(main, ["--config", str(folder / "run.yaml"), "--output-dir", str(folder / "out"),
                                       "--set", "training.bf16=false", "--set", "training.use_cpu=true"])  # fmt: skip
    assert result.exit_code == 2 and "holds no model.safetensors" in result.stderr


def test_a_plan_needs_neither_text_nor_tokenizer(folder: Path) -> None:
    (folder / "text.txt").unlink()
    (folder / "model" / "tokenizer.json").unlink()
    result = dry_run(folder)
    assert result.exit_code == 0, result.output
    assert "text: not looked at, a plan needs none (`data.train`: file" in result.stdout
    assert "tokenizer: not looked at, a plan needs none (" in result.stdout
    unknown = dry_run(folder, "--set", "training.max_steps=-1")
    assert unknown.exit_code == 0 and "so the data decides the number of steps: set it to plan them" in unknown.stdout
    assert "  total  " in unknown.stdout
    run = CliRunner().invoke(main, ["--config", str(folder / "run.yaml"), "--output-dir", str(folder / "out"),
                                    "--set", "training.use_cpu=true", "--set", "training.bf16=false"])  # fmt: skip
    assert run.exit_code == 2 and "does not exist under" in run.stderr


def test_the_accumulation_that_keeps_the_batch_is_said() -> None:
    args = TrainingArguments("unused", per_device_train_batch_size=1, gradient_accumulation_steps=16, use_cpu=True)
    on_64 = batch_line(args, 64, Hardware())
    assert on_64 == (
        "batch: 1 x 16 accumulated x 64 devices = 1,024 sequences per step; 16, as on 1 device, with no "
        "training.gradient_accumulation_steps (64 devices take at least 64); 128, as on 8 devices, with "
        "training.gradient_accumulation_steps=2"
    )
    assert batch_line(args, 8, Hardware(written_for=8)).endswith("x 8 devices = 128 sequences per step")
    assert "128, as on 8 devices, with no " in batch_line(args, 48, Hardware(written_for=8))


def test_a_model_that_reads_its_data_is_planned_without_its_memory(folder: Path) -> None:
    config: dict[str, Any] = dict(
        model_type="mixtral", vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "config.json").write_text(json.dumps(config))
    result = dry_run(folder, "--set", "training.bf16=false")
    assert result.exit_code == 0, result.output
    assert "memory: unknown, because this model cannot run without data (" in result.stdout


def test_a_machine_whose_cpu_trains_has_its_own_memory_and_no_known_peak(folder: Path) -> None:
    result = dry_run(folder, "--set", "training.use_cpu=true", "--set", "training.bf16=false")
    assert "Python and its libraries come on top" in result.stdout
    assert "time: the peak of the device is unknown; give --peak-tflops" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world-size", "0"], "--world-size 0 must be above 0."),
        (["--device-memory", "-1"], "--device-memory -1.0 must be above 0."),
        (["--peak-tflops", "nan"], "--peak-tflops nan must be above 0."),
        (["--mfu", "40"], "--mfu 40.0 must be 1 or less: it is a share."),
    ],
)
def test_hardware_that_cannot_be_is_refused(folder: Path, options: list[str], message: str) -> None:
    result = dry_run(folder, *options)
    assert result.exit_code == 2 and message in result.stderr


def test_hardware_is_named_for_a_dry_run_alone(folder: Path) -> None:
    result = CliRunner().invoke(main, ["--config", str(folder / "run.yaml"), "--world-size", "8"])
    assert result.exit_code == 2 and "--world-size belongs to --dry-run. Add it, or remove it." in result.stderr
