"""ast-train --find-lr: short runs from one start, compared by held-out text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ast_sparse.cli.train import main
from ast_sparse.config import DistillationConfig, RunConfig, SparsityConfig, load_config
from ast_sparse.errors import UserError
from ast_sparse.run import find_lr
from ast_sparse.run.output import refuse_used, replaced_bytes, run_state
from ast_sparse.schedules import lacks_rounds
from ast_sparse.sparsity import oneshot
from tests.models import generated_text, save_tiny_model

CONFIG = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/text.txt, eval: {folder}/held_out.txt, block_size: 16}}
sparsity: {{init: sparsegpt, mask_interval: 1}}
slorb: {{k: 16}}
calibration: {{samples: 4}}
evaluation: {{datasets: []}}
training: {{max_steps: 100, warmup_steps: 0.4, per_device_train_batch_size: 2, learning_rate: 1e-3, use_cpu: true,
  bf16: true, disable_tqdm: true, report_to: none}}
"""
IMP = ("--set", "sparsity.init=magnitude", "--set", "sparsity.schedule=imp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("find_lr")
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(generated_text(60))
    (folder / "held_out.txt").write_text(generated_text(20, seed=1))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def config_of(folder: Path, *overrides: str) -> RunConfig:
    return load_config(folder / "run.yaml", overrides)


def run(folder: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["--config", str(folder / "run.yaml"), "--output-dir", str(out), *options])


def test_each_rate_starts_from_the_same_masks_and_the_best_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated: list[int] = []
    inner = oneshot.sparsegpt_prune
    monkeypatch.setattr(oneshot, "sparsegpt_prune", lambda *a, **k: calibrated.append(1) or inner(*a, **k))
    result = run(folder, tmp_path / "out", "--find-lr", "1e-2,1e-4,1e30", "--find-lr-steps", "3")
    assert result.exit_code == 0, result.output
    assert len(calibrated) == 14  # the layers, once
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["find_lr.json"]
    found = json.loads((tmp_path / "out/find_lr.json").read_text())
    small, large, wild = found["candidates"]
    assert [each["learning_rate"] for each in found["candidates"]] == [1e-4, 1e-2, 1e30]
    assert wild["held_out_loss"] is None and wild["fault"].startswith("step ")
    assert f"diverged: {wild['fault']}" in result.stdout
    assert large["held_out_loss"] < small["held_out_loss"] < found["loss_before"]
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["0.01", f"{large['held_out_loss']:.4f}"] for line in lines)
    assert "--set training.learning_rate=0.01" in lines[-1]
    # alone, a rate comes to the same as after another one
    echoed: list[str] = []
    assert find_lr.find_rate(config_of(folder), str(tmp_path / "alone"), [1e-2], 3, echo=echoed.append) == 1e-2
    alone = json.loads((tmp_path / "alone/find_lr.json").read_text())
    assert alone["candidates"][0]["held_out_loss"] == large["held_out_loss"]
    refuse_used(tmp_path / "out")  # the run itself may start there
    assert run_state(tmp_path / "out") == "new"


def test_the_schedule_is_compressed_to_the_short_runs(folder: Path) -> None:
    def short(**training: Any) -> dict[str, Any]:
        config = config_of(folder)
        return find_lr._short(replace(config, training={**config.training, **training}), 10).training

    assert short()["warmup_steps"] == 0.4 and short()["max_steps"] == 10
    assert short(warmup_steps=25)["warmup_steps"] == 0.25
    assert short(warmup_steps=100)["warmup_steps"] == 10
    assert short(warmup_steps=200)["warmup_steps"] == 20  # both runs end at half the rate
    assert short(warmup_steps=111)["warmup_steps"] == 12
    decay = short(
        lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 30, "min_lr_ratio": 0.1}
    )
    assert decay["lr_scheduler_kwargs"] == {"num_decay_steps": 3, "min_lr_ratio": 0.1}
    decay = short(lr_scheduler_type="inverse_sqrt", lr_scheduler_kwargs={"timescale": 50})
    assert decay["lr_scheduler_kwargs"] == {"timescale": 5}
    decay = short(lr_scheduler_type="inverse_sqrt", warmup_steps=0)  # transformers takes 10,000 then, else the warm-up
    assert decay["lr_scheduler_kwargs"] == {"timescale": 1000}
    assert "lr_scheduler_kwargs" not in short(lr_scheduler_type="inverse_sqrt")
    config = replace(config_of(folder), distillation=DistillationConfig(alpha=0, match_flops=True))
    assert find_lr._short(config, 10).distillation == DistillationConfig(alpha=0)
    rounds = SparsityConfig(schedule="imp", rounds=6, steps_per_round=15)
    compressed = find_lr._short(replace(config_of(folder), sparsity=rounds), 10).sparsity
    assert compressed == replace(rounds, steps_per_round=1) and not lacks_rounds(compressed, 10)


def test_all_processes_work_in_one_folder_which_is_gone_after_an_error_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def fails(run: Any, *args: Any) -> Any:
        seen.append(run.output)
        assert not run.output.exists()
        (run.output / "start").mkdir(parents=True)
        (run.output / "start/block").write_bytes(bytes(3))
        raise UserError("No.")

    def find() -> None:
        with pytest.raises(UserError, match=r"^No\.$"):
            find_lr.find_rate(config_of(folder), str(out), echo=lambda line: None)

    monkeypatch.setattr(find_lr, "_compare", fails)
    out = tmp_path / "not" / "there"
    find()
    assert not (tmp_path / "not").exists()
    (out / ".find_lr/start").mkdir(parents=True)  # left by a test that was killed
    (out / ".find_lr/start/block").write_bytes(bytes(3))
    (out / "find_lr.json").write_text("{}")
    refuse_used(out)
    assert replaced_bytes(out, overwrite=False) == 3
    find()
    assert [path.name for path in out.iterdir()] == ["find_lr.json"]
    assert seen == [out / ".find_lr"] * 2  # every process finds the same one


def test_it_needs_disk_for_the_start_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(find_lr, "_compare", reached)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        find_lr.find_rate(config_of(folder, "sparsity.init=magnitude"), str(tmp_path / "out"), echo=lines.append)
    assert lines and not any("disk:" in line for line in lines)
    with pytest.raises(UserError, match=r"output_dir='.*/out' has 0\.0 GiB free, .* about 0\.0 GiB for the start\."):
        find_lr.find_rate(config_of(folder), str(tmp_path / "out"))


def test_by_default_rates_surround_that_of_the_configuration(folder: Path) -> None:
    assert find_lr._rates(config_of(folder), None) == [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    assert find_lr._rates(config_of(folder), [2.0, 1.0, 2.0]) == [1.0, 2.0]


def test_the_last_lines_say_what_speaks_against_the_result() -> None:
    def candidate(rate: float, loss: float | None) -> find_lr.Candidate:
        return find_lr.Candidate(learning_rate=rate, held_out_loss=loss, training_loss=loss, seconds=1.0)

    start: Any = type("Start", (), {"mean_nll": 3.0})
    found = [candidate(1e-4, 3.5), candidate(2e-4, 3.2), candidate(4e-4, None)]
    inside = find_lr._conclusion(found, found[1], start, 5)
    assert len(inside) == 2 and "No rate made the held-out loss lower" in inside[1]
    edge = find_lr._conclusion([candidate(1e-4, 2.5), candidate(2e-4, 2.4)][::-1], None, start, 5)
    assert edge == ["All of them diverged. Try smaller rates: --find-lr RATE,RATE,…"]
    pair = [candidate(1e-4, 2.5), candidate(2e-4, 2.4)]
    assert (
        "It is the largest that was tried: larger ones may be better" in find_lr._conclusion(pair, pair[1], start, 5)[1]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume and --find-lr cannot be combined. Give one."),
        (["--dry-run"], "--find-lr and --dry-run cannot be combined. Give one."),
        (["--find-lr", "1e-4;x"], "--find-lr '1e-4;x' is no list of numbers. Write them as --find-lr 1e-4,2e-4."),
        (["--find-lr", "0,1e-4"], "--find-lr 0 is no learning rate. Give numbers above 0"),
        (["--find-lr", "nan"], "--find-lr nan is no learning rate."),
        (["--find-lr-steps", "0"], "--find-lr-steps 0 must be 1 or more."),
        (["--set", "training.learning_rate=0"], "training.learning_rate=0 has no multiples to compare."),
        (["--set", "data.eval=null", "--set", "data.eval_share=0"], "--find-lr compares losses of held-out text"),
        (["--set", "training.lr_scheduler_type=reduce_lr_on_plateau"], "so --find-lr cannot compress it."),
        (["--set", "training.warmup_steps=5", "--set", "training.max_steps=-1"], "training.max_steps is not set"),
        ([*IMP, "--set", "sparsity.rounds=11"], "--find-lr-steps 10 has no room for sparsity.rounds=11. Give --find"),
        (
            [*IMP, "--set", "sparsity.steps_per_round=5", "--set", "training.max_steps=-1"],
            "sparsity.steps_per_round=5 counts steps, and training.max_steps is not set",
        ),
    ],
)
def test_what_cannot_be_tested_is_refused(folder: Path, tmp_path: Path, options: list[str], message: str) -> None:
    first = [] if options[0] == "--find-lr" else ["--find-lr"]
    result = run(folder, tmp_path / "out", *first, *options)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_rates_are_not_chosen_by_text_that_is_reported(folder: Path, tmp_path: Path) -> None:
    reported = config_of(folder, f"evaluation.datasets=[{folder}/held_out.txt]")
    with pytest.raises(
        UserError, match=r"--find-lr would choose a learning rate by text that is reported\. Name other"
    ):
        find_lr.find_rate(reported, str(tmp_path / "out"))


def test_steps_belong_to_the_test(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "out", "--find-lr-steps", "3")
    assert result.exit_code == 2 and "--find-lr-steps belongs to --find-lr." in result.stderr
