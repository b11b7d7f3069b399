"""Keys that older versions of transformers had get a hint that the installed version agrees with."""

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from ast_sparse.config import SECTIONS, load_config
from ast_sparse.config.removed import REMOVED
from ast_sparse.errors import UserError
from ast_sparse.training.checks.arguments import build_arguments

TRAINING = {item.name for item in dataclasses.fields(TrainingArguments)}


def message(folder: Path, line: str) -> str:
    path = folder / "run.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: t.txt}\ntraining: {" + line + "}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    return str(caught.value)


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_key_is_not_there_and_what_its_hint_names_is(tmp_path: Path, key: str) -> None:
    assert key not in TRAINING
    said = message(tmp_path, f"{key}: 1")
    assert (
        said.startswith(f"training.{key}")
        and "\n" not in said
        and "{" not in said.replace("{m", "").replace("{t", "").replace("{s", "").replace("{d", "")
    )
    for name in REMOVED[key][0]:
        section, _, field = name.partition(".")
        known = TRAINING if section == "training" else {item.name for item in dataclasses.fields(SECTIONS[section])}
        assert field in known and field in said, name


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("warmup_ratio: 0.03", "warmup_ratio=0.03: transformers 5 has no such key. Write warmup_steps: 0.03;"),
        ("group_by_length: true", "group_by_length=True: transformers 5 has no such key. Remove it; all blocks have"),
        ("evaluation_strategy: steps", "Write eval_strategy: steps."),
        ("no_cuda: true", "Write use_cpu: true."),
        ("overwrite_output_dir: true", "--overwrite"),
        ("max_seq_length: 2048", "Write data.block_size: 2048."),
    ],
)  # fmt: skip
def test_the_hint_repeats_the_value(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in message(tmp_path, line)


def test_a_token_is_not_repeated(tmp_path: Path) -> None:
    assert "hf_secret" not in message(tmp_path, "push_to_hub_token: hf_secret")


def test_what_the_hints_say_of_the_installed_version_is_so(tmp_path: Path) -> None:
    args = build_arguments({"warmup_steps": 0.03, "use_cpu": True, "report_to": "none"}, str(tmp_path))
    assert args.get_warmup_steps(1000) == 30
    build_arguments({"train_sampling_strategy": "group_by_length", "use_cpu": True}, str(tmp_path))
    build_arguments({"accelerator_config": {"dispatch_batches": True}, "use_cpu": True}, str(tmp_path))
    build_arguments({"include_for_metrics": ["inputs"], "use_cpu": True}, str(tmp_path))
