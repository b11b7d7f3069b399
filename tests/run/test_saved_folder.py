"""What the folders of a run, a pruning and an export take over from the model they began with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from ast_sparse import SparseTrainer
from ast_sparse.cli.export import main as export
from ast_sparse.cli.prune import main as prune
from ast_sparse.cli.train import main as train
from ast_sparse.config import load_config
from ast_sparse.errors import UserError
from ast_sparse.run.output import output_folder
from ast_sparse.storage.files import read_json
from tests.models import generated_text, save_tiny_model

# Not what transformers would write: no `do_sample` for the temperature, and spaces of its own.
GENERATION = b'{"temperature": 0.9,  "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}'
COMPANIONS = (
    "additional_chat_templates/tool_use.jinja", "tekken.json", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "LICENSE", "README.md", "tokenizer.model", "params.json", "assets/logo.svg",
)  # fmt: skip
LEFT_OUT = (
    "pytorch_model.bin", "model.safetensors.index.json", "original/consolidated.00.pth", "original/params.json",
    "optimizer.pt", "trainer_state.json", "run.json", "checkpoint-7/note.txt", ".cache/x", "hf_quant_config.json",
)  # fmt: skip


def call(main: Any, *arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def make_source(folder: Path) -> Path:
    """A model folder with what published ones have, its configuration in the spelling of older versions."""
    save_tiny_model(folder)
    config = read_json(folder / "config.json")
    config["torch_dtype"] = config.pop("dtype")
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None, "of_their_own": 1}
    config |= {"transformers_version": "4.40.0", "temperature": 0.7, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_bytes(GENERATION)
    for name in COMPANIONS + LEFT_OUT:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def settings(root: Path, source: Path) -> Path:
    (root / "text.txt").write_text(generated_text())
    config = {
        "model": {"name_or_path": str(source)},
        "data": {"train": [str(root / "text.txt")], "block_size": 32},
        "evaluation": {"datasets": []},
        "training": {
            "output_dir": str(root / "out"), "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2,
            "use_cpu": True, "report_to": "none", "gradient_checkpointing": True,
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(json.dumps(config))
    return root / "run.yaml"


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", **values,
    )  # fmt: skip


def blocks() -> Dataset:
    return Dataset.from_dict({"input_ids": [list(range(1, 17))] * 4})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands write from one source, each by its way."""
    root = tmp_path_factory.mktemp("saved")
    source = make_source(root / "source")
    results = [call(train, "--config", settings(root, source))]
    results.append(call(prune, source, root / "pruned", "--method", "magnitude"))
    for name, folder in (("final", "out"), ("checkpoint", "out/checkpoint-1"), ("pruned", "pruned")):
        for format in ("dense", "compressed"):
            results.append(call(export, root / folder, root / f"{name}-{format}", "--format", format))
    results.append(call(export, root / "final-compressed", root / "again", "--format", "dense", "--dtype", "float32"))
    for result in results:
        assert result.exit_code == 0, result.output
    return root


FOLDERS = (
    "out", "out/checkpoint-1", "pruned", "final-dense", "final-compressed", "checkpoint-dense",
    "checkpoint-compressed", "pruned-dense", "pruned-compressed", "again",
)  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_configuration_is_the_source_s_but_for_dtype_and_format(root: Path, name: str) -> None:
    before, after = read_json(root / "source" / "config.json"), read_json(root / name / "config.json")
    before["dtype"] = "float32" if name.startswith(("out", "again")) else "bfloat16"
    del before["torch_dtype"]
    packed = after.pop("quantization_config", None)
    assert after == before and after["use_cache"] is True
    assert (packed is not None) == name.endswith("compressed")


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_neither_weights_nor_configuration_is_kept(root: Path, name: str) -> None:
    folder = root / name
    assert (folder / "generation_config.json").read_bytes() == GENERATION
    is_export = not name.startswith("out")  # which has a card of its own
    for companion in COMPANIONS:
        kept = "SOURCE_README.md" if is_export and companion == "README.md" else companion
        assert (folder / kept).read_text() == companion
    own = {"trainer_state.json", "optimizer.pt", "run.json"} if name.startswith("out") else set()
    for left_out in {*LEFT_OUT} - own:
        assert not (folder / left_out).exists()
    if name.startswith("out"):
        assert read_json(folder / "trainer_state.json")["max_steps"] == 2
    assert AutoModelForCausalLM.from_pretrained(folder).config.use_cache


def test_records_of_a_run_stay_out_of_its_exports(root: Path) -> None:
    assert (root / "out" / "metrics.jsonl").is_file()
    written = {path.name for path in (root / "final-dense").iterdir()}
    assert not written & {"metrics.jsonl", "results.json", "config.yaml", "checkpoint-1", "training_args.bin"}
    assert {path.name for path in (root / "checkpoint-dense").iterdir()} == written


def test_random_weights_keep_the_generation_settings(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    result = call(train, "--config", settings(tmp_path, source), "--set", "model.random_weights=true")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == GENERATION


def test_overrides_are_in_the_saved_configuration(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    chosen = ("--set", "model.config_overrides={attention_dropout: 0.125, use_cache: false}")
    assert call(train, "--config", settings(tmp_path, source), *chosen).exit_code == 0
    for folder in ("out", "out/checkpoint-1"):
        config = read_json(tmp_path / folder / "config.json")
        assert (config["attention_dropout"], config["use_cache"], config["rope_theta"]) == (0.125, False, 10000.0)


def test_a_notebook_s_model_object_is_given_back_its_settings(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_source(tmp_path / "source"), dtype=torch.float32)
    before, generation = model.config.to_dict(), model.generation_config.to_dict()
    seen = []
    trainer = SparseTrainer(
        model, arguments(tmp_path / "out"), train_dataset=blocks(), eval_dataset=blocks(),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tmp_path / "source"),
    )  # fmt: skip
    model.register_forward_pre_hook(lambda module, inputs: seen.append(model.config.use_cache))
    assert model.config.to_dict() == before
    trainer.train()
    trainer.evaluate()
    assert seen and not any(seen)  # no cache is built in training and evaluation
    assert model.config.to_dict() == before and model.generation_config.to_dict() == generation
    trainer.save_model(str(tmp_path / "saved"))
    trainer.export(tmp_path / "dense", "dense", dtype="float32")
    trainer.export(tmp_path / "compressed", dtype="float32")
    source = read_json(tmp_path / "source" / "config.json")
    source["dtype"] = source.pop("torch_dtype")
    for name in ("saved", "dense", "compressed"):
        config = read_json(tmp_path / name / "config.json")
        config.pop("quantization_config", None)
        assert config == source
        assert (tmp_path / name / "generation_config.json").read_bytes() == GENERATION
        assert (tmp_path / name / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_a_changed_tokenizer_is_not_mixed_with_the_files_of_the_old_one(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    trainer = SparseTrainer(
        str(source), arguments(tmp_path / "out"), train_dataset=blocks(), processing_class=tokenizer
    )
    trainer.save_model(str(tmp_path / "saved"))
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()
    assert not (tmp_path / "saved" / "tokenizer.model").exists() and (tmp_path / "saved" / "LICENSE").is_file()


def test_a_model_changed_in_the_notebook_is_saved_as_changed(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_source(tmp_path / "source"), dtype=torch.float32)
    model.generation_config.do_sample = True
    trainer = SparseTrainer(model, arguments(tmp_path / "out"), train_dataset=blocks())
    trainer.train()
    model.config.pad_token_id = 5
    trainer.save_model(str(tmp_path / "saved"))
    saved = read_json(tmp_path / "saved" / "generation_config.json")
    assert (saved["do_sample"], saved["temperature"]) == (True, 0.9)
    assert read_json(tmp_path / "saved" / "config.json")["pad_token_id"] == 5


def test_a_source_that_is_gone_does_not_lose_the_model(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    trainer = SparseTrainer(str(source), arguments(tmp_path / "out"), train_dataset=blocks())
    trainer.train()
    source.rename(tmp_path / "elsewhere")
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "generation_config.json").read_bytes() == GENERATION
    assert read_json(tmp_path / "saved" / "config.json")["rope_theta"] == 10000.0


@pytest.mark.parametrize("notebook", [False, True])
def test_templates_and_tokens_of_an_earlier_model_do_not_stay(notebook: bool, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "gpt2")  # without a chat template
    (tmp_path / "out" / "additional_chat_templates").mkdir(parents=True)
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "added_tokens.json", "notes.md"):
        (tmp_path / "out" / name).write_text('{"<|old|>": 128}')
    if notebook:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "base")
        trainer = SparseTrainer(
            str(tmp_path / "base"), arguments(tmp_path / "out"), train_dataset=blocks(), processing_class=tokenizer
        )
        trainer.save_model()
    else:
        result = call(train, "--config", settings(tmp_path, tmp_path / "base"), "--overwrite")
        assert result.exit_code == 0, result.output
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert saved.chat_template is None and "<|old|>" not in saved.get_vocab()
    assert (tmp_path / "out" / "notes.md").is_file()


def test_a_model_may_be_saved_into_its_own_folder(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    trainer = SparseTrainer(
        str(source), arguments(tmp_path / "out"), train_dataset=blocks(), processing_class=tokenizer
    )
    trainer.save_model(str(source))
    assert (source / "generation_config.json").read_bytes() == GENERATION
    for companion in COMPANIONS:
        assert (source / companion).read_text() == companion


# ---- what cannot be saved is refused before anything is trained ---------------------------------------------------


@pytest.mark.parametrize("content", ["{broken", "[]", '{"max_new_tokens": 0}', '{"cache_implementation": "none such"}'])
@pytest.mark.parametrize("command", ["train", "dry run", "prune", "export"])
def test_generation_settings_that_cannot_be_read_are_refused(command: str, content: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (source / "generation_config.json").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    if command == "prune":
        result = call(prune, source, tmp_path / "out", "--method", "magnitude")
    elif command == "export":
        result = call(export, source, tmp_path / "out", "--format", "dense")
    else:
        config = settings(tmp_path, source)
        before = sorted(tmp_path.rglob("*"))
        result = call(train, "--config", config, *(["--dry-run"] if command == "dry run" else []))
    assert result.exit_code == 2, result.output
    assert "generation_config.json" in result.stderr and "Cannot read" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def unsavable(*arguments: Any, **values: Any) -> Any:
    raise ValueError("its merges\nare not known")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_tokenizer_that_cannot_be_saved_is_refused_before_training(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, make_source(tmp_path / "source"))
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", unsavable)
    result = call(train, "--config", config, *options)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "The tokenizer of" in result.stderr and "its merges are not known" in result.stderr


def test_settings_of_a_model_object_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)

    save_tiny_model(tmp_path / "source")
    changed = model()
    changed.generation_config.temperature = 0.5
    with pytest.raises(UserError, match=r"generation settings of .* cannot be saved: .*temperature"):
        SparseTrainer(changed, arguments(tmp_path / "out"), train_dataset=blocks())
    changed = model()
    changed.config.temperature = 0.5
    with pytest.raises(UserError, match=r"configuration of .* cannot be saved: .*generation parameters"):
        SparseTrainer(changed, arguments(tmp_path / "out"), train_dataset=blocks())


@pytest.mark.parametrize("command", ["train", "prune", "export"])
def test_a_link_that_leads_out_of_the_folder_is_refused(command: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (source / "assets" / "link").symlink_to(tmp_path / "secret")
    config = settings(tmp_path, source)
    result = {
        "train": lambda: call(train, "--config", config),
        "prune": lambda: call(prune, source, tmp_path / "out", "--method", "magnitude"),
        "export": lambda: call(export, source, tmp_path / "out", "--format", "dense"),
    }[command]()
    assert result.exit_code == 2 and "is a link to" in result.stderr and not (tmp_path / "out").exists()


def test_a_model_that_is_mounted_elsewhere_is_no_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "mounted").symlink_to(tmp_path)
    monkeypatch.setattr(Path, "resolve", Path.absolute)  # the link stands for a mount
    (tmp_path / "a.yaml").write_text(f"model: {{name_or_path: {tmp_path}/model}}\ndata: {{train: [a.txt]}}")
    with pytest.raises(UserError, match=r"mounted/model' is model\.name_or_path, and would be replaced"):
        output_folder(load_config(tmp_path / "a.yaml"), str(tmp_path / "mounted" / "model"))
