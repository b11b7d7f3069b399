"""Losses that are not finite: model, text and window are named wherever a model is measured."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from transformers import PreTrainedModel

from ast_sparse.cli.eval import main
from ast_sparse.cli.train import main as train
from ast_sparse.evaluation.measure import measure_text, total_of
from ast_sparse.evaluation.perplexity import evaluate_text, perplexity
from ast_sparse.run.stages import Measured
from ast_sparse.training.eval_loss import HeldOutLoss
from tests.evaluation.tasks import choice_task, write_task
from tests.models import generated_text, save_tiny_model, tiny_model, tiny_tokenizer

TEXT = generated_text(30)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_epsilon(model: PreTrainedModel, epsilon: float) -> PreTrainedModel:
    """The model with another epsilon in its norms; with a negative one they take the root of a negative number."""
    model.config.rms_norm_eps = epsilon
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = epsilon
    return model


def poisoned_token(window: int) -> tuple[PreTrainedModel, int]:
    """A model that computes NaN from a token which windows of 16 before the given one (from 1) do not contain.

    Its weights are finite: other ones are refused when they are loaded.
    """
    tokens = tiny_tokenizer().encode(TEXT, add_special_tokens=False)
    firsts = {token: tokens.index(token) // 16 + 1 for token in set(tokens)}
    token = next(token for token, first in firsts.items() if first == window)
    model = with_epsilon(tiny_model("qwen2"), -1e-12)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = 0.0
    return model, len(tokens) // 16


def nan_model(family: str = "qwen2") -> PreTrainedModel:
    """A model with finite weights that computes NaN from every token."""
    return with_epsilon(tiny_model(family), -1e9)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_the_first_bad_window_is_named_and_the_rest_is_written(text: Path, tmp_path: Path) -> None:
    model, windows = poisoned_token(2)
    bad = save(model, tmp_path / "bad")
    good = save_tiny_model(tmp_path / "good")
    options = ("--dataset", text, "--seq-len", "16", "--json", tmp_path / "a.json", "--report", tmp_path / "page")
    result = run(bad, good, *options)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        f"Error: {bad}, text.txt: the loss of window 2 of {windows} (16 tokens each) is not finite, and "
        "neither is the perplexity. Check the weights for values that are not finite, or load the model in float32."
    )
    first, second = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)["results"]
    assert (first["perplexity"], first["mean_nll"], first["bits_per_byte"], first["bad_window"]) == (
        None,
        None,
        None,
        2,
    )
    assert second["perplexity"] == pytest.approx(perplexity(tiny_model(), tiny_tokenizer(), TEXT, 16))
    assert second["bad_window"] is None
    assert "nan" in result.stdout and f"{second['perplexity']:.2f}" in result.stdout
    assert (tmp_path / "page" / "report.html").is_file()


def test_groups_of_a_file_are_named(tmp_path: Path) -> None:
    bad = save(nan_model(), tmp_path / "bad")
    rows = [{"text": generated_text(9, seed), "set": "ab"[seed % 2]} for seed in range(4)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(bad, "--dataset", tmp_path / "mixed.jsonl", "--by", "set", "--seq-len", "16")
    assert result.exit_code == 2
    assert f"{bad}, mixed.jsonl a: the loss of window 1 of " in result.stderr
    assert "The same is true of 2 more rows." in result.stderr


def test_the_window_of_a_total_counts_all_texts() -> None:
    model, _ = poisoned_token(2)
    other = generated_text(3, seed=3)
    clean = measure_text(tiny_model(), tiny_tokenizer(), [other], 8, progress=False)
    bad = measure_text(model, tiny_tokenizer(), [TEXT], 16, progress=False)
    assert total_of([clean, bad]).bad_window == clean.windows + 2
    assert total_of([clean, clean]).bad_window is None


def test_a_teacher_that_is_to_blame_is_named(text: Path, tmp_path: Path) -> None:
    student, teacher = save_tiny_model(tmp_path / "student"), save(nan_model("llama"), tmp_path / "teacher")
    result = run(student, "--dataset", text, "--seq-len", "16", "--teacher", teacher, "--json", tmp_path / "a.json")
    assert result.exit_code == 2
    assert "text.txt: the divergence from the teacher is not finite in window 1 of " in result.stderr
    (row,) = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)["results"]
    assert row["teacher_kl"] is None and row["perplexity"] > 1


def test_a_perplexity_beyond_float_is_inf_and_no_error(text: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    huge = save(model, tmp_path / "huge")
    result = run(huge, "--dataset", text, "--seq-len", "16", "--json", tmp_path / "a.json")
    assert result.exit_code == 0 and " inf" in result.stdout
    (row,) = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)["results"]
    assert row["mean_nll"] > 710 and row["bad_window"] is None


def test_perplexity_warns_and_names_the_window() -> None:
    model, windows = poisoned_token(2)
    with pytest.warns(UserWarning, match=rf"The loss of window 2 of {windows} \(16 tokens each\) is not finite"):
        assert math.isnan(perplexity(model, tiny_tokenizer(), TEXT, 16))
    assert evaluate_text(model, tiny_tokenizer(), TEXT, 16, progress=False).bad_window == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert perplexity(tiny_model(), tiny_tokenizer(), TEXT, 16) > 1


@pytest.mark.parametrize("kind", ["choice", "answer"])
def test_tasks_do_not_score_the_answers_of_nan(tmp_path: Path, kind: str) -> None:
    bad, good = save(nan_model(), tmp_path / "bad"), save_tiny_model(tmp_path / "good")
    if kind == "choice":
        choice_task(tmp_path, kind)
    else:
        write_task(
            tmp_path,
            kind,
            [{"question": generated_text(1, seed), "answer": ""} for seed in range(3)],
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["."], "max_gen_toks": 2},
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        )
    result = run(bad, good, "--tasks", kind, "--include-path", tmp_path, "--json", tmp_path / "a.json")
    assert result.exit_code == 2
    assert f"Error: {bad}, {kind}: its value is not a number." in result.stderr
    rows = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)["tasks"]
    assert {row["model"] for row in rows if row["value"] is None} == {str(bad)}
    assert all(row["value"] is not None for row in rows if row["model"] == str(good))


def tree(root: Path, **evaluation: Any) -> Path:
    config = {
        "model": {"name_or_path": str(root / "model")},
        "data": {"root": str(root), "train": "text.txt", "eval_share": 0.1, "block_size": 16},
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True,
            "disable_tqdm": True, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
            "output_dir": str(root / "out"),
        },
        "evaluation": {"seq_len": 16, "windows": 2, **evaluation},
    }  # fmt: skip
    (root / "run.yaml").write_text(json.dumps(config))
    return root / "run.yaml"


def test_a_run_stops_at_a_dense_model_whose_loss_is_not_finite(text: Path, tmp_path: Path) -> None:
    save(nan_model("llama"), tmp_path / "model")
    result = CliRunner().invoke(train, ["--config", str(tree(tmp_path))])
    assert result.exit_code == 2
    assert "The dense model, heldout: the loss of window 1 of 1 (16 tokens each) is not finite" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_whose_result_is_not_finite_is_saved_and_says_so(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model(tmp_path / "model")
    plain, plain_add = Measured._measure, HeldOutLoss.add

    def measure(self: Measured, stage: str, model: PreTrainedModel, *others: Any, **shown: Any) -> Any:
        bad = nan_model("llama") if stage.startswith(("retrained", "training")) else model
        return plain(self, stage, bad, *others, **shown)

    def add(self: HeldOutLoss, by_position: Tensor, labels: Tensor) -> None:
        plain_add(self, by_position * math.nan, labels)

    monkeypatch.setattr(Measured, "_measure", measure)
    monkeypatch.setattr(HeldOutLoss, "add", add)
    result = CliRunner().invoke(train, ["--config", str(tree(tmp_path, steps=1))])
    assert result.exit_code == 2
    assert "evaluation.steps, heldout: the loss of window 1 of 1" in caplog.text
    assert "Step 1: eval_loss is nan" in caplog.text
    assert "The retrained 2:4 model, heldout: the loss of window 1 of 1" in result.stderr.splitlines()[-1]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["retrained 2:4"]["heldout"]["perplexity"] is None
    assert results["dense"]["heldout"]["perplexity"] > 1
