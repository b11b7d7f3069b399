"""A resume is compared with its checkpoint: refused, or allowed and printed, setting by setting."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from ast_sparse.config import SECTIONS
from ast_sparse.training.resume.checkpoints import RUN_RECORD
from ast_sparse.training.resume.setting_classes import _FIELDS, _TRAINING, kind_of
from tests.models import generated_text
from tests.training.resume.resumed_runs import base, refusal, resume, train

# ---- every setting has a class -------------------------------------------------------------------------------------


def test_every_field_of_training_arguments_is_in_exactly_one_class() -> None:
    listed = [name for names in _TRAINING.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) == {item.name for item in dataclasses.fields(TrainingArguments)}
    assert kind_of("training", "a_field_of_a_later_version") == "same"


def test_every_field_of_every_section_has_a_class() -> None:
    fields = {f"{name}.{item.name}" for name, section in SECTIONS.items() for item in dataclasses.fields(section)}
    assert all(kind_of(*name.split(".")) in ("same", "content", "free") for name in fields)
    assert _FIELDS.keys() <= fields
    assert kind_of("data", "still_to_come") == "same" and kind_of("evaluation", "still_to_come") == "free"


# ---- refused -------------------------------------------------------------------------------------------------------

REFUSED = {
    "training.learning_rate=0.01": "0.001", "training.weight_decay=0.1": "0", "training.adam_beta1=0.8": "0.9",
    "training.adam_beta2=0.99": "0.999", "training.adam_epsilon=1e-6": "1e-08",
    "training.lr_scheduler_type=cosine": "'linear'", "training.warmup_steps=1": "0", "training.max_grad_norm=0.5": "1",
    "training.seed=7": "42", "training.data_seed=7": "null", "training.neftune_noise_alpha=5": "null",
    "training.dataloader_drop_last=true": "False", "training.train_sampling_strategy=sequential": "'random'",
    "training.average_tokens_across_devices=false": "True", "training.label_names=[labels]": "null",
    "training.remove_unused_columns=false": "True", "training.length_column_name=size": "'length'",
    "training.ignore_data_skip=true": "False", "training.accelerator_config.split_batches=true": "False",
    "training.tf32=false": "null", "training.bf16=true": "False",
    "data.block_size=8": "16", "data.seed=1": "0", "data.eval_share=0.2": "0.1", "data.packing=documents": "'joined'",
    "distillation.alpha=0.5": "0.67", "distillation.temperature=2": "1", "distillation.kind=reverse_kl": "'kl'",
    "distillation=null": "{'kind'", "distillation.match_flops=true": "",
    "sparsity.mask_decay=1e-3": "6e-05", "sparsity.decay_placement=weight": "'momentum'", "slorb.k=8": "16",
    "slorb.train_projection=false": "True", "sparsity.decay_schedule=static": "'annealed'",
    "model.config_overrides.attention_dropout=0.1": "null", "model.random_weights=true": "False",
}  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_a_setting_that_decides_the_weights_is_refused_with_both_values(root: Path, out: Path, change: str) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    said = refusal(resume(root, out, change))
    if change not in ("distillation.match_flops=true", "training.bf16=true", "training.tf32=false"):
        name = change.partition("=")[0]
        assert f"{name}=" in said and f" differs from {REFUSED[change]}" in said and "checkpoint-1'" in said, said
        assert "Resume with" in said and "start a new" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("training.gradient_accumulation_steps=1", ("gradient_accumulation_steps=1", "= 2 sequences", "= 4 in")),
        ("data.train=other.txt", ("data.train=['other.txt'] differs from ['text.txt']", "the tokens differ")),
        ("data.eval=other.txt", ("data.eval=['other.txt'] differs from null", "the tokens differ")),
        ("model.name_or_path={root}/other_model", ("other_model' differs from", "the weights differ")),
        ("model.teacher={root}/other_model", ("other_model' differs from null", "the weights differ")),
    ],
)
def test_what_is_compared_together_or_by_content_is_refused(
    root: Path, out: Path, change: str, names: tuple[str, ...]
) -> None:
    config = (out / "config.yaml").read_text()
    said = refusal(resume(root, out, change.format(root=root)))
    assert all(name in said for name in names), said
    assert (out / "config.yaml").read_text() == config


# ---- allowed and printed -------------------------------------------------------------------------------------------

SYNCS = "accelerator_config.gradient_accumulation_kwargs.sync_each_batch"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["training.logging_steps=5"], "training.logging_steps 10 -> 5"),
        (["training.save_steps=2"], "training.save_steps 1 -> 2"),
        (["training.save_total_limit=3"], "training.save_total_limit null -> 3"),
        (["training.eval_strategy=steps", "training.eval_steps=1"], "training.eval_strategy 'no' -> 'steps'"),
        (["training.run_name=again"], "training.run_name null -> 'again'"),
        (["training.gradient_checkpointing=true"], "training.gradient_checkpointing False -> True"),
        ([f"training.{SYNCS}=true"], f"training.{SYNCS} False -> True"),
        (["training.dataloader_num_workers=1"], "training.dataloader_num_workers 0 -> 1"),
        (["sparsity.fast_forward=off"], "sparsity.fast_forward 'auto' -> 'off'"),
        (["evaluation.prompts=[]"], "evaluation.prompts"),
        (["watch.spike=warn"], "watch.spike 'off' -> 'warn'"),
        (["calibration.samples=4"], "calibration.samples 128 -> 4"),
        (["model.attn_implementation=eager"], "model.attn_implementation null -> 'eager'"),
        (
            ["training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=1"],
            "training.per_device_train_batch_size 2 -> 4",
        ),
    ],
)
def test_what_leaves_the_weights_as_they_are_is_printed(root: Path, out: Path, settings: list[str], line: str) -> None:
    result = resume(root, out, *settings)
    assert result.exit_code == 0 and f"resume: {line}" in result.stdout, result.output
    assert result.stdout.count(f"resume: {line}") == 1
    name, _, value = settings[0].partition("=")
    stored = yaml.safe_load((out / "config.yaml").read_text())
    for key in name.split("."):
        stored = stored[key]
    assert stored == yaml.safe_load(value)
    whole, again = (load_file(folder / "model.safetensors") for folder in (root / "whole", out))
    assert all(torch.allclose(tensor, again[name], atol=1e-6) for name, tensor in whole.items())


def test_nothing_is_printed_if_nothing_changed(root: Path, out: Path) -> None:
    result = resume(root, out, f"training.output_dir={out}", "distillation.alpha=0.67")
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("resume: ")]
    assert lines == [f"resume: training.output_dir '{root}/whole' -> '{out}'"]
    whole, again = (load_file(folder / "model.safetensors") for folder in (root / "whole", out))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_an_empty_mapping_counts_as_not_set(root: Path, out: Path) -> None:
    result = resume(root, out, "training.lr_scheduler_kwargs={}", "model.config_overrides={}")
    assert result.exit_code == 0 and result.stdout.count("resume: ") == 1, result.output


def test_a_folder_that_moved_is_the_same(root: Path, out: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "model", tmp_path / "moved")
    shutil.copy(root / "text.txt", tmp_path / "moved.txt")
    result = resume(root, out, f"model.name_or_path={tmp_path}/moved", f"data.train={tmp_path}/moved.txt")
    assert result.exit_code == 0, result.output
    assert f"-> '{tmp_path}/moved' (the same content)" in result.stdout
    assert resume(root, out, f"model.teacher={root}/model").exit_code == 0


# ---- the same name, other content ----------------------------------------------------------------------------------


def changed_copy(root: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A separate run whose inputs may be changed."""
    shutil.copytree(root / "model", tmp_path / "model")
    shutil.copy(root / "text.txt", tmp_path / "text.txt")
    shutil.copytree(root / "whole", tmp_path / "out")
    record = tmp_path / "out/checkpoint-1" / RUN_RECORD
    record.write_text(record.read_text().replace(str(root), str(tmp_path)))
    return tmp_path / "out", base(tmp_path)


def test_edited_text_is_refused(root: Path, tmp_path: Path) -> None:
    out, tree = changed_copy(root, tmp_path)
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("sparse", "masks", 1))
    said = refusal(resume(tmp_path, out, tree=tree))
    assert "data.train=['text.txt'] is not what" in said and "the tokens differ" in said


def test_other_weights_under_the_same_name_are_refused(root: Path, tmp_path: Path) -> None:
    out, tree = changed_copy(root, tmp_path)
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name][3] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    said = refusal(resume(tmp_path, out, tree=tree))
    assert "model.name_or_path=" in said and "the weights differ" in said


def test_another_configuration_of_the_teacher_is_refused(root: Path, tmp_path: Path) -> None:
    tree = base(root)
    tree["model"]["teacher"] = str(shutil.copytree(root / "other_model", tmp_path / "teacher"))
    assert train(tmp_path, tmp_path / "out", tree=tree).exit_code == 0
    path = tmp_path / "teacher/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
    said = refusal(resume(tmp_path, tmp_path / "out", tree=tree))
    assert "The teacher's configuration has rms_norm_eps=0.001, but 1e-06 in" in said


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("config.json", {"attention_dropout": 0.1}, "attention_dropout=0.1, but 0.0 in"),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}, "the tokenizer, chat_template differ"),
    ],
)
def test_another_configuration_or_template_is_refused(
    root: Path, tmp_path: Path, file: str, values: dict[str, Any], expected: str
) -> None:
    out, tree = changed_copy(root, tmp_path)
    path = tmp_path / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert expected in refusal(resume(tmp_path, out, tree=tree))


def test_domains_are_compared_by_shares_and_content(root: Path, tmp_path: Path) -> None:
    tree = base(root)
    domains = {name: {"train": f"{name}.txt", "share": 0.5, "target": 2.0} for name in ("text", "other")}
    tree["data"] = {
        "root": str(root),
        "domains": domains,
        "eval_share": 0.1,
        "block_size": 16,
        "update": {"type": "bandit"},
    }
    tree["training"] |= {"eval_strategy": "steps", "eval_steps": 1}
    out = tmp_path / "out"
    assert train(tmp_path, out, tree=tree).exit_code == 0
    said = refusal(resume(tmp_path, out, "data.domains.other.target=1.5", tree=tree))
    assert "data.domains.other.target=1.5 differs from 2 in" in said
    said = refusal(resume(tmp_path, out, "training.eval_steps=2", tree=tree))  # shares follow the evaluations
    assert "training.eval_steps=2 differs from 1 in" in said
    text = (root / "other.txt").read_text()
    (tmp_path / "moved.txt").write_text(text)
    assert resume(tmp_path, out, f"data.domains.other.train={tmp_path}/moved.txt", tree=tree).exit_code == 0
    (tmp_path / "moved.txt").write_text(text.replace("masks move", "move masks"))
    said = refusal(resume(tmp_path, out, f"data.domains.other.train={tmp_path}/moved.txt", tree=tree))
    assert "data.domains.other.train=" in said and "the tokens, other differ" in said


def test_calibration_settings_matter_if_masks_are_made_by_them(root: Path, tmp_path: Path) -> None:
    settings = ["sparsity.criterion=wanda", "calibration.samples=4"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert train(root, tmp_path / "out", *options).exit_code == 0
    said = refusal(resume(root, tmp_path / "out", *settings, "calibration.damping=0.1"))
    assert "calibration.damping=0.1 differs from 0.01" in said


@pytest.mark.parametrize("streaming", [True, False])
def test_edited_rows_of_jsonl_and_streams_are_refused(root: Path, tmp_path: Path, streaming: bool) -> None:
    tree = base(root)
    tree["data"] = {
        "root": str(tmp_path),
        "train": "t.jsonl",
        "eval_share": 0,
        "block_size": 16,
        "streaming": streaming,
    }
    rows = [{"text": generated_text(8, seed=seed)} for seed in range(100)]  # a stream of more than 256 blocks
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(tmp_path, tmp_path / "out", tree=tree).exit_code == 0
    assert "training.learning_rate=0.5 differs" in refusal(
        resume(tmp_path, tmp_path / "out", "training.learning_rate=0.5", tree=tree)
    )
    rows[97]["text"] = "The masks move late. " + rows[7]["text"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "the tokens differ" in refusal(resume(tmp_path, tmp_path / "out", tree=tree))
