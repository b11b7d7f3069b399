"""ast-eval: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import ast_sparse
from ast_sparse.cli.eval import main
from ast_sparse.evaluation.perplexity import evaluate_text, perplexity, wikitext2_rows
from tests.cli.eval_runs import refused, run, table
from tests.hub_cache import OLDER, put_on_hub
from tests.models import generated_text, save_tiny_model, tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "some.txt").write_text(generated_text(30))
    return str(tmp_path / "some.txt")


def test_table_gives_the_figure_with_its_window(model: str, text: str) -> None:
    expected = evaluate_text(tiny_model(), tiny_tokenizer(), generated_text(30), 48)
    header, _, row = table(run(model, "--dataset", text, "--seq-len", "48"))
    assert header == ["model", "dataset", "dtype", "window", "windows", "predicted tokens", "perplexity"]
    figures = [f"{expected.windows}", f"{expected.predicted_tokens:,}", f"{expected.perplexity:.2f}"]
    assert row == [model, "some.txt", "float32", "48", *figures]


def test_default_window_is_the_most_a_short_model_takes(model: str, text: str) -> None:
    assert table(run(model, "--dataset", text))[2][3] == "128"


def test_limit_and_dtype_are_shown(model: str, text: str) -> None:
    row = table(run(model, "--dataset", text, "--seq-len", "48", "--limit", "2", "--dtype", "bfloat16"))[2]
    assert row[2] == "bfloat16" and row[4].startswith("2 of ") and row[5] == "94"


def test_each_model_has_its_row(model: str, text: str, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "gpt2", "gpt2", seed=1)
    rows = table(run(model, other, "--dataset", text, "--seq-len", "48"))[2:]
    assert [row[0] for row in rows] == [model, str(other)]
    assert rows[1][-1] == f"{perplexity(tiny_model('gpt2', 1), tiny_tokenizer(), generated_text(30), 48):.2f}"


def test_wikitext2_is_read_from_a_folder_or_a_file(model: str, tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(" \n" + generated_text(30, 3) + "\n")
    (tmp_path / "wiki.valid.raw").write_text(generated_text(30, 4) + "\n")
    (tmp_path / "mine.txt").write_text(generated_text(30, 3))
    rows = [
        table(run(model, "--seq-len", "48", "--data-dir", place, *more))[2]
        for place, more in ((tmp_path, ()), (tmp_path, ("--split", "validation")), (tmp_path / "mine.txt", ()))
    ]
    assert [row[1] for row in rows] == ["wikitext2 test", "wikitext2 validation", "mine.txt"]
    texts = [wikitext2_rows(split, tmp_path) for split in ("test", "validation")]
    expected = [f"{perplexity(tiny_model(), tiny_tokenizer(), text, 48):.2f}" for text in texts]
    assert [row[-1] for row in rows[:2]] == expected and expected[0] != expected[1]


def test_documents_of_a_jsonl_file_are_joined_by_a_blank_line(model: str, tmp_path: Path) -> None:
    rows = [generated_text(10, 1), generated_text(10, 2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in rows))
    row = table(run(model, "--dataset", tmp_path / "a.jsonl", "--text-field", "body", "--seq-len", "48"))[2]
    assert row[-1] == f"{perplexity(tiny_model(), tiny_tokenizer(), rows, 48):.2f}"


def test_json_holds_figures_settings_and_versions(model: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "figures.json"
    run(model, "--dataset", text, "--seq-len", "48", "--json", file)
    record = json.loads(file.read_text())
    expected = perplexity(tiny_model(), tiny_tokenizer(), generated_text(30), 48)
    assert record["results"][0]["perplexity"] == pytest.approx(expected, rel=1e-9)
    assert record["results"][0]["seq_len"] == 48 and record["results"][0]["dtype"] == "float32"
    assert record["settings"]["dataset"] == text and record["settings"]["device"] == "cpu"
    versions = {
        "ast_sparse": ast_sparse.__version__, "torch": torch.__version__, "transformers": transformers.__version__
    }  # fmt: skip
    assert record["versions"] == versions
    assert [path.name for path in file.parent.iterdir()] == ["figures.json"]


def test_a_revision_on_the_hub_is_measured(
    model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save_tiny_model(tmp_path / "older", seed=1)
    name = put_on_hub(Path(model), tmp_path / "hub", monkeypatch, older)
    row = table(run(name, "--dataset", text, "--seq-len", "48", "--revision", OLDER))[2]
    assert row[-1] == f"{perplexity(tiny_model(seed=1), tiny_tokenizer(), generated_text(30), 48):.2f}"


def test_tokenizer_may_come_from_elsewhere(model: str, text: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "bare")
    assert "tokenizer" in refused(tmp_path / "bare", "--dataset", text)
    assert table(run(tmp_path / "bare", "--dataset", text, "--tokenizer", model))[2][0] == str(tmp_path / "bare")


def test_bad_input_is_one_line_before_any_model_is_measured(model: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("two of four")
    small = tiny_config("llama")
    small.vocab_size = 64
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "small")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n[]\n')
    cases = {
        "file": ((model, "--dataset", tmp_path / "none.txt"), "no such file, and not wikitext2"),
        "content": ((model, "--dataset", tmp_path / "bad.jsonl"), "bad.jsonl, line 2: not a JSON object"),
        "short": ((model, "--dataset", tmp_path / "short.txt"), "fewer than one window of 128"),
        "window": ((model, "--dataset", text, "--seq-len", "129"), "longer than the model's 128 positions"),
        "model": ((model, tmp_path / "nowhere", "--dataset", text), "nowhere`, and it is not a hub id"),
        "folder": ((model, "--data-dir", tmp_path), "No wiki.test.raw in `--data-dir`"),
        "hub": ((model,), "set `--data-dir` to a folder with wiki.test.raw"),
        "json": ((model, "--dataset", text, "--json", tmp_path / "no" / "a.json"), "does not exist. Create it first."),
        "json folder": ((model, "--dataset", text, "--json", tmp_path), "is a folder. Name a file."),
        "split": ((model, "--dataset", text, "--split", "test"), "--split belongs to --dataset wikitext2"),
        "limit": ((model, "--dataset", text, "--limit", "0"), "--limit"),
        "tokenizer": ((tmp_path / "small", "--dataset", text, "--tokenizer", model), "the model has 64 embeddings"),
        "none": (("--dataset", text), "MODEL"),
    }
    for name, (arguments, message) in cases.items():
        assert message in refused(*arguments), name


def test_unknown_device_is_refused(model: str, text: str) -> None:
    result = CliRunner().invoke(main, [model, "--dataset", text, "--device", "nonsense"])
    assert result.exit_code == 2 and "--device nonsense cannot be used" in result.stderr


def test_failed_write_leaves_the_old_file(
    model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "figures.json"
    file.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    result = run(model, "--dataset", text, "--json", file)
    assert result.exit_code == 2 and "figures.json cannot be written: disk full" in result.stderr
    assert "perplexity" in result.stdout  # the figures are not lost
    assert file.read_text() == "old" and len(list(file.parent.iterdir())) == 1
