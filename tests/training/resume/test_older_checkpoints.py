"""Resuming checkpoints of older versions, with damaged records, and without an optimizer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ast_sparse.training.resume.checkpoints import RUN_RECORD
from tests.training.resume.resumed_runs import base, refusal, resume, train, trainer


def test_an_older_checkpoint_is_resumed_and_says_what_is_compared(root: Path, out: Path) -> None:
    (out / "checkpoint-1" / RUN_RECORD).unlink()
    assert "distillation.alpha=0.5 differs from 0.67" in refusal(resume(root, out, "distillation.alpha=0.5"))
    result = resume(root, out)
    assert result.exit_code == 0 and "is from a version that saved no settings" in result.stdout, result.output
    whole, again = (load_file(folder / "model.safetensors") for folder in (root / "whole", out))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_an_older_checkpoint_is_compared_with_its_optimizer(root: Path, out: Path) -> None:
    (out / "checkpoint-1" / RUN_RECORD).unlink()
    for change, before in (("learning_rate=0.1", "0.001"), ("weight_decay=0.1", "0"), ("adam_beta2=0.9", "0.999")):
        said = refusal(resume(root, out, f"training.{change}"))
        assert f"training.{change} differs from {before} in" in said


def test_an_older_checkpoint_has_no_bos(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", bos_token="<|end|>")
    front = TemplateProcessing(single="<|end|> $A", pair="<|end|> $A $B", special_tokens=[("<|end|>", 0)])
    tokenizer.backend_tokenizer.post_processor = front
    tokenizer.save_pretrained(tmp_path / "model")
    tree = base(root)
    tree["model"]["name_or_path"] = str(tmp_path / "model")
    tree["data"]["bos"] = "none"
    assert train(tmp_path, tmp_path / "out", tree=tree).exit_code == 0
    (tmp_path / "out/checkpoint-1" / RUN_RECORD).unlink()
    del tree["data"]["bos"]
    said = refusal(resume(tmp_path, tmp_path / "out", tree=tree))
    assert "data.bos='auto' puts BOS before the text" in said and "Resume with data.bos=none" in said
    assert resume(tmp_path, tmp_path / "out", "data.bos=none", tree=tree).exit_code == 0


def test_a_dry_run_compares_what_needs_no_weights(root: Path, out: Path) -> None:
    def dry(setting: str) -> Result:
        return train(root, out, "--resume", str(out / "checkpoint-1"), "--dry-run", "--set", setting)

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "= 8 sequences a step differs" in refusal(dry("training.per_device_train_batch_size=4"))
    assert "training.learning_rate=0.1 differs" in refusal(dry("training.learning_rate=0.1"))
    assert "resume: training.max_steps 2 -> 3 (" in dry("training.max_steps=3").stdout
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_dry_run_with_the_settings_of_the_run_reports_no_difference(root: Path, tmp_path: Path) -> None:
    tree = base(root)
    del tree["training"]["use_cpu"]  # a dry run sets it, with or without an accelerator
    assert train(root, tmp_path / "out", tree=tree).exit_code == 0
    options = ["--resume", str(tmp_path / "out/checkpoint-1"), "--dry-run"]
    unchanged = train(root, tmp_path / "out", *options, tree=tree)
    assert unchanged.exit_code == 0 and "resume: " not in unchanged.stdout, unchanged.output
    changed = train(root, tmp_path / "out", *options, "--set", "training.dataloader_pin_memory=false", tree=tree)
    assert changed.stdout.count("resume: ") == 1
    assert "resume: training.dataloader_pin_memory True -> False\n" in changed.stdout


def test_what_a_signal_changes_is_not_a_setting_of_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="no")
    run.args.save_strategy = "steps"  # as PreemptionCallback does
    run.run_record.save(run, tmp_path)
    assert json.loads((tmp_path / RUN_RECORD).read_text())["settings"]["training"]["save_strategy"] == "no"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 2}', '{"format_version": 1, "settings": {}}'])
def test_a_damaged_record_is_named(root: Path, out: Path, content: str) -> None:
    (out / "checkpoint-1" / RUN_RECORD).write_text(content)
    assert "run.json" in refusal(resume(root, out))


def test_checkpoints_without_optimizer_are_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert train(root, out, "--set", "training.save_only_model=true").exit_code == 0
    before = (out / "config.yaml").read_text()
    for option in (["--resume"], ["--resume", str(out / "checkpoint-1")]):
        said = refusal(train(root, out, *option))
        assert "training.save_only_model=true" in said and "step 0" in said and "--overwrite" in said
    assert (out / "config.yaml").read_text() == before and (out / "checkpoint-2").is_dir()
