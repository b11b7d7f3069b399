"""A resume is compared with its checkpoint: refused, or allowed and printed, setting by setting."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, TrainingArguments

from ast_sparse import DistillationConfig, SLoRBConfig, SparseAdamW, SparseTrainer, SparsityConfig, UserError
from ast_sparse.cli.train import main
from ast_sparse.config import SECTIONS
from ast_sparse.training.resume.checkpoints import RUN_RECORD
from ast_sparse.training.resume.fingerprints import blocks_fingerprint, weights_fingerprint
from ast_sparse.training.resume.setting_classes import (
    _FIELDS,
    _TRAINING,
    kind_of,
    past_follows_length,
    rest_follows_length,
)
from tests.models import generated_text, save_tiny_model, tiny_model, tiny_tokenizer
from tests.training.small_runs import arguments, blocks


def base(root: Path) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(root / "model")},
        "data": {"root": str(root), "train": "text.txt", "eval_share": 0.1, "block_size": 16},
        "sparsity": {"mask_interval": 2},
        "slorb": {"k": 16},
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
            "report_to": "none", "use_cpu": True, "save_steps": 1, "disable_tqdm": True, "logging_steps": 10,
        },
        "evaluation": {"datasets": []},
    }  # fmt: skip


def train(root: Path, out: Path, *options: str, tree: dict[str, Any] | None = None) -> Result:
    path = root / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(base(root) if tree is None else tree))
    return CliRunner().invoke(main, ["--config", str(path), "--output-dir", str(out), *options])


def resume(root: Path, out: Path, *settings: str, **kwargs: Any) -> Result:
    options = [part for setting in settings for part in ("--set", setting)]
    return train(root, out, "--resume", str(out / "checkpoint-1"), *options, **kwargs)


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return result.stderr.rstrip("\n").splitlines()[-1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("same_run")
    save_tiny_model(root / "model")
    save_tiny_model(root / "other_model", seed=1)
    for name, seed in (("text", 0), ("other", 5)):
        (root / f"{name}.txt").write_text(generated_text(150, seed=seed))
    result = train(root, root / "whole")
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def out(root: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run, whose weights must not change."""
    shutil.copytree(root / "whole", tmp_path / "out")
    yield tmp_path / "out"


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


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["training.logging_steps=5"], "training.logging_steps 10 -> 5"),
        (["training.save_steps=2"], "training.save_steps 1 -> 2"),
        (["training.save_total_limit=3"], "training.save_total_limit null -> 3"),
        (["training.eval_strategy=steps", "training.eval_steps=1"], "training.eval_strategy 'no' -> 'steps'"),
        (["training.run_name=again"], "training.run_name null -> 'again'"),
        (["training.gradient_checkpointing=true"], "training.gradient_checkpointing False -> True"),
        (["training.dataloader_num_workers=1"], "training.dataloader_num_workers 0 -> 1"),
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
    section, key = name.split(".")
    assert yaml.safe_load((out / "config.yaml").read_text())[section][key] == yaml.safe_load(value)
    whole, again = (load_file(folder / "model.safetensors") for folder in (root / "whole", out))
    assert all(torch.allclose(tensor, again[name], atol=1e-6) for name, tensor in whole.items())


def test_nothing_is_printed_where_nothing_changed(root: Path, out: Path) -> None:
    result = resume(root, out, f"training.output_dir={out}", "distillation.alpha=0.67")
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("resume: ")]
    assert lines == [f"resume: training.output_dir '{root}/whole' -> '{out}'"]
    whole, again = (load_file(folder / "model.safetensors") for folder in (root / "whole", out))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_an_empty_mapping_is_nothing_given(root: Path, out: Path) -> None:
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
    """A run of its own, whose inputs may be changed."""
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
    assert "The teacher's configuration has rms_norm_eps=0.001, in" in said and "1e-06" in said


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("config.json", {"attention_dropout": 0.1}, "attention_dropout=0.1, in"),
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


def test_calibration_counts_where_masks_are_made_by_it(root: Path, tmp_path: Path) -> None:
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


# ---- older checkpoints, damaged records, checkpoints without optimizer ---------------------------------------------


def test_a_checkpoint_of_before_is_resumed_and_says_what_is_compared(root: Path, out: Path) -> None:
    (out / "checkpoint-1" / RUN_RECORD).unlink()
    assert "distillation.alpha=0.5 differs from 0.67" in refusal(resume(root, out, "distillation.alpha=0.5"))
    result = resume(root, out)
    assert result.exit_code == 0 and "is of a version that kept no settings" in result.stdout, result.output
    whole, again = (load_file(folder / "model.safetensors") for folder in (root / "whole", out))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_a_checkpoint_of_before_is_compared_with_its_optimizer(root: Path, out: Path) -> None:
    (out / "checkpoint-1" / RUN_RECORD).unlink()
    for change, before in (("learning_rate=0.1", "0.001"), ("weight_decay=0.1", "0"), ("adam_beta2=0.9", "0.999")):
        said = refusal(resume(root, out, f"training.{change}"))
        assert f"training.{change} differs from {before} in" in said


def test_a_checkpoint_of_before_has_no_bos(root: Path, tmp_path: Path) -> None:
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


def test_what_a_signal_changes_is_no_setting_of_the_run(tmp_path: Path) -> None:
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


# ---- lengths -------------------------------------------------------------------------------------------------------


def test_a_run_whose_steps_do_not_depend_on_its_length_may_become_longer(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        made = trainer(folder, max_steps=steps, lr_scheduler_type="constant")
        made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return made.model.state_dict()

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "short", 4)
    longer = run(tmp_path / "longer", 6, tmp_path / "short/checkpoint-2")
    assert all(torch.equal(tensor, longer[name]) for name, tensor in whole.items())


def test_another_length_is_printed_with_what_follows_from_it(root: Path, out: Path) -> None:
    for settings, line in (
        (["training.max_steps=3"], "training.max_steps 2 -> 3 ("),
        (["training.max_steps=-1", "training.num_train_epochs=0.02"], "training.max_steps 2 -> -1 ("),
    ):
        result = resume(root, out, *settings)
        assert result.exit_code == 0 and f"resume: {line}training.lr_scheduler_type=linear and" in result.stdout
        shutil.rmtree(out)
        shutil.copytree(root / "whole", out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.max_steps=1"], "training.max_steps=1 "),
        (["training.max_steps=-1", "training.num_train_epochs=0.01"], "training.num_train_epochs=0.01 "),
    ],
)
def test_a_run_is_not_shorter_than_what_is_done(root: Path, out: Path, settings: list[str], message: str) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    said = refusal(train(root, out, "--resume", str(out / "checkpoint-2"), *options))
    assert f"{message}ends before step 2 of" in said and "Resume from an earlier checkpoint, or raise" in said


@pytest.mark.parametrize(
    ("args", "sparsity", "expected"),
    [
        ({}, {}, ["training.lr_scheduler_type=linear", "sparsity.decay_schedule=annealed"]),
        ({"lr_scheduler_type": "constant"}, {}, ["sparsity.decay_schedule=annealed"]),
        ({"lr_scheduler_type": "constant"}, {"decay_schedule": "static"}, []),
        ({"lr_scheduler_type": "constant"}, {"mask_decay": 0.0}, []),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}, {"decay_ramp": 0.0}, []),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, {"decay_ramp": 0.0},
            ["training.warmup_steps=0.1"],
        ),
    ],
)  # fmt: skip
def test_what_follows_from_the_number_of_steps(
    tmp_path: Path, args: dict[str, Any], sparsity: dict[str, Any], expected: list[str]
) -> None:
    config = SparsityConfig(**sparsity)
    assert rest_follows_length(arguments(tmp_path, **args), config) == expected
    assert past_follows_length(config, SLoRBConfig(start=0.0)) is None
    assert past_follows_length(config, SLoRBConfig(start=0.5)) == "slorb.start=0.5"
    assert past_follows_length(SparsityConfig(schedule="gmp"), None) == "sparsity.schedule=gmp"


# ---- SparseTrainer -------------------------------------------------------------------------------------------------


def trainer(folder: Path, model: Any = None, **kwargs: Any) -> SparseTrainer:
    names = {item.name for item in dataclasses.fields(TrainingArguments)}
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    args |= {key: kwargs.pop(key) for key in list(kwargs) if key in names}
    kwargs.setdefault("sparsity_config", SparsityConfig(mask_interval=2, mask_decay=1e-2, decay_schedule="static"))
    kwargs.setdefault("distillation_config", DistillationConfig(alpha=0.5))
    kwargs.setdefault("train_dataset", blocks())
    return SparseTrainer(model or tiny_model(), arguments(folder, **args), **kwargs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("notebook")
    trainer(folder).train()
    return str(folder / "checkpoint-2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-4}, r"training\.learning_rate=0\.0001 differs from 0\.003"),
        ({"weight_decay": 0.1}, r"training\.weight_decay=0\.1 differs from 0 in"),
        ({"per_device_train_batch_size": 2}, r"= 2 sequences a step differs from 4 x 1 x 1 = 4"),
        ({"distillation_config": DistillationConfig(alpha=0.6)}, r"distillation\.alpha=0\.6 differs from 0\.5"),
        ({"distillation_config": None}, r"distillation=null differs from"),
        ({"train_dataset": blocks(seed=1)}, r"train_dataset is not what .*: the tokens differ"),
        ({"train_dataset": blocks(size=8)}, r"train_dataset is not what .*: the tokens differ"),
        ({"eval_dataset": blocks(count=4)}, r"eval_dataset is not what .*: the tokens differ"),
        ({"processing_class": tiny_tokenizer()}, r"processing_class is not what"),
        ({"teacher_model": tiny_model(seed=3)}, r"teacher_model is not what .*: the weights differ"),
        ({"model": tiny_model(seed=3)}, r"model is not what .*: the weights differ"),
    ],
)
def test_a_notebook_is_compared_as_well(tmp_path: Path, checkpoint: str, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **change).train(resume_from_checkpoint=checkpoint)


def test_a_notebook_prints_what_may_change(tmp_path: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, logging_steps=2).train(resume_from_checkpoint=checkpoint)
    assert "resume: training.logging_steps 1 -> 2\n" in capsys.readouterr().out


def test_an_optimizer_built_by_hand_is_compared(tmp_path: Path) -> None:
    def run(folder: Path, rate: float, resumed: str | None = None) -> None:
        made = trainer(folder)
        made.optimizer = SparseAdamW([{"params": list(made.model.parameters())}], lr=rate)
        made.train(resume_from_checkpoint=resumed)

    run(tmp_path / "a", 1e-3)
    checkpoint = str(tmp_path / "a/checkpoint-2")
    run(tmp_path / "b", 1e-3, checkpoint)
    with pytest.raises(UserError, match=r"optimizer\.lr=\[0\.01\] differs from \[0\.001\]"):
        run(tmp_path / "c", 1e-2, checkpoint)


# ---- fingerprints --------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_tokens_not_files_or_types(tmp_path: Path) -> None:
    rows = blocks().to_list()
    blocks().save_to_disk(str(tmp_path / "saved"))
    same = [
        blocks(), Dataset.load_from_disk(str(tmp_path / "saved")), Dataset.from_list(rows),
        blocks().map(lambda row: row, load_from_cache_file=False),
    ]  # fmt: skip
    assert len({blocks_fingerprint(part) for part in same}) == 1
    others = [
        blocks(seed=1), blocks().select(range(31)), blocks().shuffle(seed=3),
        blocks().add_column("labels", [[1] * 16] * 32),
        blocks(count=16, size=32),
    ]  # fmt: skip
    assert blocks_fingerprint(blocks()) not in {blocks_fingerprint(part) for part in others}
    changed = [dict(row) for row in rows]
    changed[30]["input_ids"] = [*rows[30]["input_ids"][:-1], 99]
    assert blocks_fingerprint(rows) != blocks_fingerprint(changed)
    assert blocks_fingerprint(iter(rows)) is None


def test_a_fingerprint_of_weights_sees_one_entry_and_their_order() -> None:
    model = torch.nn.Linear(512, 512)
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    with torch.no_grad():
        model.weight[5, 77] += 1e-6
        changed = weights_fingerprint(model)
        model.weight[5, 77] -= 1e-6
        model.weight.copy_(model.weight.flip(0))
    assert len({before, changed, weights_fingerprint(model)}) == 3
