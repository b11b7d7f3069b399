from pathlib import Path

import pytest
import yaml

from ast_sparse.config import (
    DataConfig,
    DistillationConfig,
    EvaluationConfig,
    SLoRBConfig,
    SparsityConfig,
    load_config,
)
from ast_sparse.errors import UserError

BASE = """
model:
  name_or_path: some/model
data:
  train: text.txt
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_fill_what_the_file_leaves_out(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, BASE))
    assert config.data.train == ("text.txt",)
    assert config.sparsity == SparsityConfig()
    assert config.distillation == DistillationConfig()
    assert config.slorb is None and config.evaluation == EvaluationConfig()


def test_yaml_1_1_surprises_are_read_as_meant(tmp_path: Path) -> None:
    text = BASE + (
        "sparsity: {pattern: 2:4, mask_decay: 1e-4}\n"
        "slorb: {enabled: no}\n"
        "training: {learning_rate: 2e-5, save_strategy: no, bf16: no, max_steps: 010, run_name: 1:30}\n"
    )
    config = load_config(write(tmp_path, text))
    assert config.sparsity.pattern == "2:4" and config.sparsity.mask_decay == 1e-4
    assert config.slorb is not None and config.slorb.enabled is False
    assert config.training == {
        "learning_rate": 2e-5, "save_strategy": "no", "bf16": False, "max_steps": 10, "run_name": "1:30",
    }  # fmt: skip


def test_an_integer_stands_for_a_float_and_one_entry_for_a_list(tmp_path: Path) -> None:
    text = BASE + "sparsity: {mask_decay: 0, exclude: down_proj}\ntraining: {warmup_steps: 5, num_train_epochs: 1}\n"
    config = load_config(write(tmp_path, text))
    assert config.sparsity.mask_decay == 0.0 and config.sparsity.exclude == ("down_proj",)
    assert config.training == {"warmup_steps": 5, "num_train_epochs": 1}


def test_overrides_replace_and_create_keys(tmp_path: Path) -> None:
    overrides = [
        "sparsity.mask_interval=20", "sparsity.pattern=4:8", "training.lr_scheduler_kwargs.min_lr_rate=0.1",
        "data.train=[a.txt, {path: allenai/c4, name: en}]", "distillation=null",
    ]  # fmt: skip
    config = load_config(write(tmp_path, BASE), overrides)
    assert (config.sparsity.mask_interval, config.sparsity.n, config.sparsity.m) == (20, 4, 8)
    assert config.training == {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    assert config.data.train == ("a.txt", {"path": "allenai/c4", "name": "en"})
    assert config.distillation is None


def test_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    text = BASE + "slorb: {k: 32}\ndistillation: {ce_weight: 1, kl_weight: 0.5, temperature: 2}\n"
    text += "training: {bf16: yes, lr_scheduler_type: cosine}\n"
    config = load_config(write(tmp_path, text))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("sparsty: {}", r"unknown section 'sparsty'. Did you mean 'sparsity'"),
        ("sparsity: {mask_intervall: 5}", r"Unknown key sparsity.mask_intervall. Did you mean 'mask_interval'"),
        ("training: {learning_rat: 5}", r"Unknown key training.learning_rat. Did you mean 'learning_rate'"),
        ("sparsity: {mask_interval: ten}", r"sparsity.mask_interval='ten' is text, expected an integer"),
        ("sparsity: {mask_interval: 2.5}", r"sparsity.mask_interval=2.5 is a number, expected an integer"),
        ("sparsity: {mask_interval: true}", r"sparsity.mask_interval=True is true or false, expected an integer"),
        ("sparsity: {pattern: 2}", r"sparsity.pattern=2 is an integer, expected text"),
        ("sparsity: {pattern: 4:4}", r"sparsity.pattern='4:4' needs 0 < N < M"),
        ("sparsity: {pattern: 0:4}", r"sparsity.pattern='0:4' needs 0 < N < M"),
        ("sparsity: {pattern: two:four}", r"sparsity.pattern='two:four' is not of the form N:M"),
        ("sparsity: {mask_interval: -1}", r"sparsity.mask_interval=-1 must be 0"),
        ("sparsity: {mask_decay: -0.1}", r"sparsity.mask_decay=-0.1 must be 0 or more"),
        ("sparsity: {decay_ramp: 2}", r"sparsity.decay_ramp=2.0 must lie between 0 and 1"),
        ("sparsity: {decay_placement: moment}", r"sparsity.decay_placement='moment' is text, expected 'momentum' or"),
        (
            "sparsity: {masked_weights: true}",
            r"sparsity.masked_weights=True is true or false, expected 'auto' or 'kept'",
        ),
        ("sparsity: {criterion: taylor}", r"sparsity.criterion='taylor' is text, expected 'magnitude'"),
        ("basis: {rotation_steps: -1}", r"basis.rotation_steps=-1 must be 0 \(no rotation\) or more"),
        (
            "basis: {}\nsparsity: {pattern: unstructured}",
            r"pattern='unstructured' has no groups to arrange channels in",
        ),
        ("basis: {}\ndistillation: {kind: squarehead}", r"distillation.kind='squarehead' compares hidden states with"),
        ("sparsity: []", r"Section 'sparsity' is \[\], not a mapping"),
        ("distillation: {alpha: 1.5}", r"distillation.alpha=1.5 must lie between 0 and 1"),
        ("distillation: {alpha: 0.5, kl_weight: 1}", r"alpha=0.5 and distillation.kl_weight=1.0 cannot be combined"),
        ("distillation: {kl_weight: 1}", r"distillation.ce_weight is missing"),
        ("distillation: {temperature: 0}", r"distillation.temperature=0.0 must be above 0"),
        ("distillation: {kind: mse}", r"distillation.kind='mse' is text, expected 'kl' or 'reverse_kl'"),
        ("slorb: {k: 0}", r"slorb.k=0 must be at least 1"),
        ("slorb: {enabled: maybe}", r"slorb.enabled='maybe' is text, expected true or false"),
        ("training: {bf16: maybe}", r"training.bf16='maybe' is text, expected true or false"),
        ("training: {max_steps: many}", r"training.max_steps='many' is text, expected an integer"),
        ("training: {save_strategy: stepz}", r"'stepz' is text, expected 'no' or 'steps' .*Did you mean 'steps'"),
        ("training: {learning_rate: .nan}", r"training.learning_rate=nan is not a finite number"),
        ("evaluation: {windows: 0}", r"evaluation.windows=0 must be at least 1"),
        ("evaluation: {seq_len: 1}", r"evaluation.seq_len=1 must be at least 2"),
        ("model: {name_or_path: a}", r"line 6: key 'model' appears twice"),
        ("2: {}", r"line 6: key 2 is an integer. Keys are names"),
        ("sparsity: {pattern: 2:4", r"is not valid YAML: line"),
        ("sparsity: !!python/object:os.system {}", r"line 6: the tag .*os\.system is not supported"),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(tmp_path: Path, addition: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(write(tmp_path, BASE + addition + "\n"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- a\n", "is a list, not a mapping"),
        ("model: {name_or_path: a}\n", "section 'data' is missing"),
        ("model: {}\ndata: {train: a}\n", r"model.name_or_path is missing"),
        ("model: {name_or_path: a}\ndata: {train: []}\n", r"data.train=\(\) names no source"),
        ("model: {name_or_path: a}\ndata: {train: a, eval_share: 0.9}\n", "data.eval_share=0.9 must lie between"),
        ("model: {name_or_path: a}\ndata: {train: a, block_size: 1}\n", "data.block_size=1 must be at least 2"),
        ("model: {name_or_path: 5}\ndata: {train: a}\n", "model.name_or_path=5 is an integer, expected text"),
        ("model: {name_or_path: [a]}\ndata: {train: a}\n", "is a list, expected text"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml' does not exist"):
        load_config(tmp_path / "no.yaml")


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "\ufeff" + BASE)).data.train == ("text.txt",)


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(path)


@pytest.mark.parametrize("override", ["sparsity.mask_interval", "=5", "sparsity..x=1", "model.name_or_path.x=1"])
def test_a_malformed_override_is_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match="--set"):
        load_config(write(tmp_path, BASE), [override])


def test_sections_check_their_values_in_python_too() -> None:
    with pytest.raises(UserError, match=r"sparsity.mask_interval='ten'"):
        SparsityConfig(mask_interval="ten")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"data.train"):
        DataConfig(train=None)  # type: ignore[arg-type]
    assert SLoRBConfig(k=32).enabled
