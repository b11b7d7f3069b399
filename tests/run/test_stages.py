"""`evaluation.steps`: perplexities during training, which it does not notice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from ast_sparse import load_causal_lm, perplexity
from ast_sparse.cli.train import main
from ast_sparse.config import DataConfig, EvaluationConfig, ModelConfig, RunConfig
from ast_sparse.errors import UserError
from ast_sparse.run.stages import Measured, PerplexityCallback
from tests.data.bos_models import bos_tokenizer
from tests.models import generated_text, save_tiny_model, tiny_tokenizer
from tests.training.small_runs import trainer, weights

KEYS = ("heldout_perplexity", "other_perplexity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a model with dropout: `quiet` measures at its stages only, `loud` every two steps, `resumed` from 2."""
    folder = tmp_path_factory.mktemp("measure")
    save_tiny_model(folder / "model", "gpt2")
    (folder / "text.txt").write_text(generated_text(100))
    (folder / "texts").mkdir()
    (folder / "texts/other.txt").write_text(generated_text(40, seed=1))
    train(folder, "quiet")
    train(folder, "loud", "--set", "evaluation.steps=2")
    train(folder, "resumed", "--set", "evaluation.steps=2", "--resume", str(folder / "loud/checkpoint-2"))
    return folder


def train(folder: Path, out: str, *options: str) -> None:
    tree = {
        "model": {"name_or_path": str(folder / "model"), "config_overrides": {"resid_pdrop": 0.2}},
        "data": {"root": str(folder), "train": "text.txt", "eval_share": 0.1, "block_size": 16},
        "sparsity": {"mask_interval": 2},
        "training": {
            "max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "report_to": "none",
            "use_cpu": True, "save_steps": 2, "disable_tqdm": True, "logging_steps": 2,
        },
        "evaluation": {"datasets": ["heldout", "texts/other.txt"], "seq_len": 16, "windows": 3},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["--config", str(folder / "run.yaml"), "--output-dir", str(folder / out), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def history(folder: Path, out: str) -> list[dict[str, Any]]:
    return json.loads((folder / out / "trainer_state.json").read_text())["log_history"]


def measured(folder: Path, out: str) -> list[tuple[Any, ...]]:
    return [(log["step"], *(log[key] for key in KEYS)) for log in history(folder, out) if KEYS[0] in log]


def test_perplexities_are_logged_every_so_many_steps_beside_the_loss(folder: Path) -> None:
    rows = measured(folder, "loud")
    assert [row[0] for row in rows] == [2, 4]
    assert all(1 < value < 1000 for row in rows for value in row[1:]) and rows[0] != rows[1]
    assert [log["step"] for log in history(folder, "loud") if "loss" in log] == [2, 4]
    assert not measured(folder, "quiet")


def test_measuring_during_training_changes_no_weight(folder: Path) -> None:
    quiet, loud = (load_file(folder / out / "model.safetensors") for out in ("quiet", "loud"))
    assert all(torch.equal(tensor, loud[name]) for name, tensor in quiet.items())


def test_a_resumed_run_measures_the_same(folder: Path) -> None:
    assert measured(folder, "resumed") == measured(folder, "loud")
    loud, resumed = (load_file(folder / out / "model.safetensors") for out in ("loud", "resumed"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in loud.items())


class Placed(torch.nn.Module):
    """Stands for a model, and writes down where it is put."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, device: Any) -> None:  # type: ignore[override]
        self.places.append(str(device))


def test_a_model_is_on_the_device_only_to_be_measured_where_it_is_sharded_from_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measured, "_measure", lambda *args, **kwargs: {})
    for datasets, sharded, places in (
        ([], True, []),
        (["heldout"], False, ["meta"]),
        (["heldout"], True, ["meta", "cpu"]),
    ):
        config = RunConfig(
            model=ModelConfig(name_or_path="model"), data=DataConfig(train=["text"]),
            evaluation=EvaluationConfig(datasets=datasets),
        )  # fmt: skip
        measured = Measured(config, TrainingArguments(str(tmp_path), use_cpu=True, fsdp=sharded))
        measured.device = torch.device("meta")
        model: Any = Placed()
        assert measured("dense", model, tiny_tokenizer(), None) == {} and model.places == places


def test_texts_are_read_from_the_field_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "two of four", "text": "no"}) + "\n")
    config = RunConfig(
        model=ModelConfig(name_or_path="model"),
        data=DataConfig(root=str(tmp_path), train=("text",), text_field="body"),
        evaluation=EvaluationConfig(datasets=("other.jsonl",)),
    )
    assert Measured(config, TrainingArguments(str(tmp_path), use_cpu=True)).texts == {"other.jsonl": ["two of four"]}


EACH_TWO: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize(
    "name, domains, evaluates",
    [
        ("eval.txt", None, EACH_TWO),
        ("eval.txt", None, {"eval_on_start": True}),
        ("eval_cc.txt", {"cc": {"train": "cc.txt", "share": 1.0}}, EACH_TWO),
    ],
)
def test_a_text_is_not_logged_under_the_name_of_the_held_out_text(
    tmp_path: Path, name: str, domains: Any, evaluates: dict[str, Any]
) -> None:
    (tmp_path / name).write_text(generated_text(4))
    config = RunConfig(
        model=ModelConfig(name_or_path="model"),
        data=DataConfig(root=str(tmp_path), train=None if domains else ["text"], domains=domains),
        evaluation=EvaluationConfig(datasets=[name], steps=2),
    )
    assert Measured(config, TrainingArguments(str(tmp_path), use_cpu=True)).texts  # nothing else has that name
    with pytest.raises(UserError, match=rf"'{name}' would be logged as {name[:-4]}_perplexity, as the held-out text"):
        Measured(config, TrainingArguments(str(tmp_path), use_cpu=True, **evaluates))


@pytest.mark.parametrize("bos, told", [("auto", True), ("none", True), ("block", False), ("window", False)])
def test_a_note_says_where_windows_of_texts_lack_bos(tmp_path: Path, bos: Any, told: bool) -> None:
    (tmp_path / "other.txt").write_text(generated_text(4))
    for datasets, expected in ((["heldout"], False), (["heldout", str(tmp_path / "other.txt")], told)):
        config = RunConfig(
            model=ModelConfig(name_or_path="model"), data=DataConfig(train=["text"], bos=bos),
            evaluation=EvaluationConfig(datasets=datasets),
        )  # fmt: skip
        measured = Measured(config, TrainingArguments(str(tmp_path), use_cpu=True))
        assert (f"(data.bos={bos})" in str(measured.note(bos_tokenizer()))) == expected
        if bos in ("auto", "none"):  # for the others a tokenizer without BOS is refused
            assert measured.note(tiny_tokenizer()) is None


def test_the_figure_of_the_last_step_is_that_of_the_retrained_model(folder: Path, tmp_path: Path) -> None:
    options = ("--set", "evaluation.steps=5", "--output-dir", str(tmp_path))
    train(folder, "last", *options)
    rows = measured(tmp_path, ".")
    stages = json.loads((tmp_path / "results.json").read_text())
    retrained = [stages["retrained 2:4"][name]["perplexity"] for name in ("heldout", "texts/other.txt")]
    assert rows == [(5, *retrained)]


def test_a_model_with_slorb_is_measured_with_and_without_it(folder: Path) -> None:
    train(folder, "slorb", "--set", "slorb.k=8", "--set", "evaluation.report=true")
    stages = json.loads((folder / "slorb/results.json").read_text())
    assert list(stages) == ["dense", "one-shot 2:4", "retrained 2:4", "retrained 2:4 without SLoRB"]
    loaded = {
        "retrained 2:4": load_causal_lm(folder / "slorb"),
        "retrained 2:4 without SLoRB": AutoModelForCausalLM.from_pretrained(folder / "slorb"),
    }
    text = (folder / "texts/other.txt").read_text()
    for stage, model in loaded.items():
        found = perplexity(model, tiny_tokenizer(), text, seq_len=16, windows=3)
        assert stages[stage]["texts/other.txt"]["perplexity"] == pytest.approx(found, rel=1e-6)
    with_it, without = (stages[stage]["texts/other.txt"]["perplexity"] for stage in loaded)
    assert abs(with_it - without) > 1e-3
    page = (folder / "slorb/report/report.html").read_text()
    assert page.count("<td>retrained 2:4</td>") == 1 and page.count("<td>retrained 2:4 without SLoRB</td>") == 1
    train(folder, "slorb", "--set", "slorb.k=8", "--resume")  # a stage of the retrained model is measured again
    assert list(json.loads((folder / "slorb/results.json").read_text())) == list(stages)


def test_random_numbers_drawn_by_a_measurement_are_not_missed_in_training(tmp_path: Path) -> None:
    results = []
    for measures in (False, True):
        run = trainer(tmp_path / str(measures), args=dict(max_steps=3))
        run.model.model.layers[0].register_forward_hook(lambda module, inputs, output: output + torch.rand(1) * 0.1)
        if measures:
            run.add_callback(PerplexityCallback(1, lambda model: {"drawn": torch.rand(1).item()}, run.log))
        run.train()
        results.append(weights(run.model))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_a_resume_that_measures_otherwise_measures_all_stages_so(folder: Path) -> None:
    train(folder, "other")
    train(folder, "other", "--resume", "--set", "evaluation.datasets=[heldout]", "--set", "evaluation.windows=2")
    results = json.loads((folder / "other/results.json").read_text())
    assert list(results) == ["dense", "one-shot 2:4", "retrained 2:4"]
    assert all(list(row) == ["heldout"] and row["heldout"]["windows"] == 2 for row in results.values())
