"""ast-eval: several texts, groups, windows, a teacher, and tasks of the LM Evaluation Harness."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import lm_eval.models.huggingface
import pytest
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedModel

from ast_sparse.data.tokens.chat import tokenise_conversations
from ast_sparse.evaluation.measure import measure_text
from ast_sparse.export.export import export_model
from ast_sparse.storage.load import load_causal_lm
from tests.cli.eval_runs import refused, run, table
from tests.data.chats import ROWS, tokenizer
from tests.evaluation.tasks import choice_task, perplexity_task
from tests.export.sparse_models import sparse_model
from tests.models import generated_text, save_tiny_model, tiny_config, tiny_model, tiny_tokenizer

HEADER = ["model", "dataset", "dtype", "window", "windows", "predicted tokens", "perplexity"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    rows = [{"text": generated_text(9, seed), "meta": {"set": "ab"[seed % 2]}} for seed in range(5)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "mixed.jsonl"


def twin(tokens: list[int], seq_len: int, stride: int | None = None) -> tuple[float, int]:
    """Mean loss in float64 and its number of tokens, with non-overlapping or overlapping windows."""
    model = tiny_model().double().eval()
    losses: list[float] = []
    done = 1
    for begin in range(0, len(tokens), stride or seq_len):
        window = tokens[begin : begin + seq_len]
        if (stride is None and len(window) < seq_len) or begin + len(window) <= done:
            break
        with torch.no_grad():
            log_p = model(torch.tensor([window])).logits[0].log_softmax(-1)
        first = 1 if stride is None else done - begin
        losses += [-float(log_p[at - 1, window[at]]) for at in range(first, len(window))]
        done = begin + len(window)
    return sum(losses) / len(losses), len(losses)


def test_json_figure_equals_a_plain_loop(model: str, tmp_path: Path) -> None:
    text = generated_text(30)
    (tmp_path / "a.txt").write_text(text)
    tokens = tiny_tokenizer().encode(text, add_special_tokens=False)
    for options, stride in (((), None), (("--stride", "16"), 16)):
        run(model, "--dataset", tmp_path / "a.txt", "--seq-len", "48", *options, "--json", tmp_path / "a.json")
        (result,) = json.loads((tmp_path / "a.json").read_text())["results"]
        loss, count = twin(tokens, 48, stride)
        assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert (result["predicted_tokens"], result["stride"]) == (count, stride)
        expected = loss * count / math.log(2) / result["scored_bytes"]
        assert result["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_every_text_has_its_row(model: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        (tmp_path / f"{name}.txt").write_text(generated_text(30, seed))
    (tmp_path / "wiki.test.raw").write_text(generated_text(30, 3))
    names = [tmp_path / "one.txt", "wikitext2", tmp_path / "two.txt"]
    options = [each for name in names for each in ("--dataset", name)]
    header, _, *rows = table(run(model, *options, "--seq-len", "48", "--data-dir", tmp_path, "--json", tmp_path / "j"))
    assert header == HEADER
    assert [row[1] for row in rows] == ["one.txt", "wikitext2 test", "two.txt"]
    alone = table(run(model, "--dataset", tmp_path / "two.txt", "--seq-len", "48"))[2]
    assert rows[2] == alone
    assert json.loads((tmp_path / "j").read_text())["settings"]["dataset"] == list(map(str, names))


def test_groups_of_a_file_have_rows_and_a_total(model: str, domains: Path) -> None:
    options = ("--by", "meta.set", "--join", "separate", "--seq-len", "48")
    rows = table(run(model, "--dataset", domains, *options))[2:]
    assert [row[1] for row in rows] == ["mixed.jsonl a", "mixed.jsonl b", "mixed.jsonl, all"]
    whole = table(run(model, "--dataset", domains, *options[2:]))[2]
    assert rows[2][2:] == whole[2:]


def test_columns_are_added_where_they_are_asked_for(model: str, domains: Path, tmp_path: Path) -> None:
    teacher = save_tiny_model(tmp_path / "teacher", seed=1)
    options = ("--dataset", domains, "--seq-len", "48", "--stride", "32", "--bits-per-byte", "--teacher", teacher)
    header, _, row = table(run(model, *options, "--json", tmp_path / "a.json"))
    assert header == [*HEADER[:4], "stride", *HEADER[4:], "bits per byte", "KL to teacher", "top-1 agreement"]
    documents = [json.loads(line)["text"] for line in domains.read_text().splitlines()]
    expected = measure_text(
        tiny_model(), tiny_tokenizer(), documents, 48, stride=32, teacher=tiny_model(seed=1), progress=False
    )
    assert row[4] == "32" and row[-3] == f"{expected.bits_per_byte:.4f}"
    assert row[-2:] == [f"{expected.teacher_kl:.4f}", f"{expected.teacher_agreement:.2%}"]
    (result,) = json.loads((tmp_path / "a.json").read_text())["results"]
    assert result["teacher_kl"] == pytest.approx(expected.teacher_kl, rel=1e-9)
    assert result["join"] == "blank-line" and result["documents"] == 5


@pytest.mark.parametrize("join", ["newline", "none", "eos", "separate"])
def test_joins(model: str, domains: Path, join: str) -> None:
    documents = [json.loads(line)["text"] for line in domains.read_text().splitlines()]
    expected = measure_text(tiny_model(), tiny_tokenizer(), documents, 48, join=join, progress=False)
    row = table(run(model, "--dataset", domains, "--seq-len", "48", "--join", join))[2]
    assert row[4:] == [f"{expected.windows}", f"{expected.predicted_tokens:,}", f"{expected.perplexity:.2f}"]


def test_tasks_are_printed_and_recorded(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, str]] = []

    class Asked(HFLM):
        def __init__(self, **options: Any) -> None:
            given.append((options["batch_size"], options["pretrained"].config._attn_implementation))
            super().__init__(**options)

    monkeypatch.setattr(lm_eval.models.huggingface, "HFLM", Asked)
    choice_task(tmp_path, "mine")
    perplexity_task(tmp_path, "text", [generated_text(5)])
    options = ("--tasks", "mine, text", "--include-path", tmp_path, "--limit", "4", "--num-fewshot", "1")
    more = ("--batch-size", "2", "--attn-implementation", "eager")
    header, _, *rows = table(run(model, *options, *more, "--json", tmp_path / "a.json"))
    assert given == [(2, "eager")]
    assert header == ["model", "task", "dtype", "few-shot", "examples", "metric", "value", "stderr"]
    assert [row[1:6] for row in rows[:2]] == [["mine", "float32", "1", "4", name] for name in ("acc", "acc_norm")]
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["results"] == [] and record["versions"]["lm_eval"]
    assert f"{record['tasks'][0]['value']:.4f}" == rows[0][6] and record["tasks"][0]["model"] == model
    assert {task["metric"] for task in record["tasks"]} >= {"acc", "bits_per_byte"}


def test_a_wrong_second_model_is_found_before_the_tasks_of_the_first(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ast_sparse.cli.eval._load", lambda *args, **place: pytest.fail("a model was loaded"))
    message = refused(model, tmp_path / "missing", "--tasks", choice_task(tmp_path, "mine"))
    assert str(tmp_path / "missing") in message


def test_texts_and_tasks_in_one_command(model: str, domains: Path, tmp_path: Path) -> None:
    file = choice_task(tmp_path, "mine")
    result = run(model, "--tasks", file, "--dataset", domains, "--seq-len", "48")
    first, second = result.stdout.split("\n\n")
    assert "perplexity" in first and "acc_norm" in second


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compressed_checkpoints_and_slorb_are_evaluated_as_they_are(family: str, tmp_path: Path) -> None:
    model: PreTrainedModel = sparse_model(family, slorb_k=8)
    choice_task(tmp_path, "mine")
    perplexity_task(tmp_path, "text", [generated_text(5)])
    (tmp_path / "a.txt").write_text(generated_text(30))
    for format in ("compressed", "dense"):
        export_model(model, tmp_path / format, format, dtype="float32", tokenizer=tiny_tokenizer())
    assert (tmp_path / "compressed" / "slorb").is_dir()
    options = ("--tasks", "mine,text", "--include-path", tmp_path, "--dataset", tmp_path / "a.txt")
    run(tmp_path / "compressed", tmp_path / "dense", *options, "--json", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    loaded = load_causal_lm(tmp_path / "compressed")
    expected = measure_text(loaded, tiny_tokenizer(), [generated_text(30)], 128, progress=False).perplexity
    assert [row["perplexity"] for row in record["results"]] == pytest.approx([expected] * 2, rel=1e-6)
    half = len(record["tasks"]) // 2
    values = [row["value"] for row in record["tasks"]]
    assert values[:half] == pytest.approx(values[half:], rel=1e-6)
    bare = measure_text(sparse_model(family), tiny_tokenizer(), [generated_text(30)], 128, progress=False).perplexity
    assert bare != pytest.approx(expected, rel=1e-4)  # SLoRB took part


def test_bad_options_are_one_line_and_leave_nothing(model: str, domains: Path, tmp_path: Path) -> None:
    small = tiny_config("llama")
    small.vocab_size = 64
    type(tiny_model())(small).save_pretrained(tmp_path / "small")
    (tmp_path / "short.txt").write_text("two of four")
    before = sorted(path.name for path in tmp_path.iterdir())
    text = ("--dataset", domains, "--seq-len", "48")
    cases = {
        "stride": ((model, *text, "--stride", "48"), "--stride 48 must be between 1 and 47"),
        "by": ((model, *text, "--by", "domain"), "--by domain: "),
        "by wikitext": ((model, "--by", "domain"), "groups the documents of a file, not wikitext2"),
        "join": ((model, *text, "--join", "tab"), "--join"),
        "c4": ((model, "--dataset", "c4"), "--dataset c4 is read from the hub"),
        "teacher": ((model, *text, "--teacher", tmp_path / "no"), "no"),
        "vocabulary": (
            (model, *text, "--teacher", tmp_path / "small"),
            f"--teacher {tmp_path / 'small'} has a vocabulary",
        ),
        "second": ((model, *text, "--dataset", tmp_path / "nowhere"), "nowhere: no such file"),
        "task": ((model, "--tasks", tmp_path / "no.yaml", "--include-path", tmp_path / "no"), "is not a folder"),
        "no task": ((model, "--tasks", ","), "names no task"),
        "only tasks": ((model, *text, "--include-path", tmp_path), "--include-path belongs to --tasks"),
        "only texts": ((model, "--tasks", "mine", "--teacher", model), "--teacher belongs to --dataset"),
    }
    for name, (arguments, message) in cases.items():
        assert message in refused(*arguments, "--json", tmp_path / "out.json"), name
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_of_chat_data_what_the_assistant_says_is_predicted(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in ROWS))
    text = (tmp_path / "model", "--dataset", tmp_path / "chat.jsonl", "--seq-len", "16")
    losses = []
    for row in tokenise_conversations(Dataset.from_dict({"messages": ROWS}), tokenizer(), "rows"):
        for begin in range(0, len(row["input_ids"]), 16):
            ids, labels = row["input_ids"][begin : begin + 16], row["labels"][begin : begin + 16]
            with torch.no_grad():
                log_p = tiny_model().double()(torch.tensor([ids])).logits[0].log_softmax(-1)
            losses += [-float(log_p[at - 1, label]) for at, label in enumerate(labels) if at and label != -100]
    found = table(run(*text, "--teacher", tmp_path / "model"))[2]
    assert found[5:7] == [f"{len(losses)}", f"{math.exp(sum(losses) / len(losses)):.2f}"]
    assert found[-2:] == ["0.0000", "100.00%"]
    assert "--join newline joins text, but" in refused(*text, "--join", "newline")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(*text)
    (tmp_path / "plain.txt").write_text(generated_text(40))
    assert "has no chat template" in refused(tmp_path / "model", "--dataset", tmp_path / "plain.txt", *text[1:])


def test_report_has_the_figures_of_the_table(model: str, domains: Path, tmp_path: Path) -> None:
    result = run(model, "--dataset", domains, "--seq-len", "48", "--report", tmp_path / "out", "--prompt", "the sparse")
    perplexity = table(result)[2][-1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f">{perplexity}</td>" in page and "the sparse …" in page
    assert result.stdout.splitlines()[-1] == f"Wrote {tmp_path / 'out' / 'report.html'}"
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["density.png"]


def test_report_that_cannot_be_made_is_refused_before_anything_is_measured(
    model: str, domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    text = (model, "--dataset", domains)
    cases = {
        ("--report", tmp_path / "a.html"): "ends in .html. Name a folder for report.html",
        ("--report", tmp_path / "file"): "file is a file. Name a folder.",
        ("--report", tmp_path / "file" / "below"): "cannot be written to. Name another folder.",
        ("--report", tmp_path / "out", "--prompt", " "): "--prompt is empty. Give it text, or remove it.",
        ("--prompt", "the sparse"): "--prompt belongs to --report.",
    }
    for arguments, message in cases.items():
        assert message in refused(*text, *arguments), arguments
    monkeypatch.setattr("ast_sparse.report.page.find_spec", lambda name: None)
    message = refused(*text, "--report", tmp_path / "out")
    assert message.endswith("--report needs matplotlib for its figures. Install it: pip install 'ast-sparse[plots]'.")
    assert not (tmp_path / "out").exists()


def test_error_in_a_later_text_keeps_the_figures_of_the_first(model: str, domains: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("two of four")
    result = run(model, "--dataset", domains, "--dataset", tmp_path / "short.txt", "--seq-len", "48")
    assert result.exit_code == 2 and "mixed.jsonl" in result.stdout
    assert f"{model}: short.txt: The text has" in result.stderr.splitlines()[-1]


def test_a_teacher_is_compared_over_the_rows_both_have(model: str, tmp_path: Path) -> None:
    words, teacher = generated_text(40), tiny_model(seed=1)
    expected = measure_text(tiny_model(), tiny_tokenizer(), [words], 48, teacher=teacher, progress=False)
    wide = tiny_model(seed=1)
    wide.resize_token_embeddings(160, mean_resizing=False)
    with torch.no_grad():
        wide.get_input_embeddings().weight[128:].normal_(0, 3)
    wide.save_pretrained(tmp_path / "wide")
    (tmp_path / "text.txt").write_text(words)
    text = ("--dataset", tmp_path / "text.txt", "--seq-len", "48", "--teacher")
    assert "has no tokenizer to compare" in refused(model, *text, tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    row = table(run(model, *text, tmp_path / "wide"))[2]
    assert row[-2:] == [f"{expected.teacher_kl:.4f}", f"{expected.teacher_agreement:.2%}"]
    back = table(run(tmp_path / "wide", *text, model))[2]
    assert back[-1] == row[-1]


def test_a_teacher_with_renamed_tokens_is_measured_on_text_without_them(tmp_path: Path) -> None:
    for folder, name in (("base", "<reserved>"), ("chat", "<call>")):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.add_special_tokens({"additional_special_tokens": [name]})
        tiny_model().save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    (tmp_path / "text.txt").write_text(generated_text(40))
    options = ("--seq-len", "48", "--teacher", tmp_path / "chat", "--dataset")
    result = run(tmp_path / "base", *options, tmp_path / "text.txt")
    assert table(result)[2][-2:] == ["0.0000", "100.00%"] and "has other names for 1 added tokens" in result.stderr
    (tmp_path / "call.txt").write_text(generated_text(400) + "<reserved>")
    message = refused(tmp_path / "base", *options, tmp_path / "call.txt")
    assert "The text has the token 82, which is '<reserved>' to the student and '<call>' to --teacher." in message


def test_a_teacher_with_another_tokenizer_is_refused_and_one_without_is_said(
    model: str, domains: Path, tmp_path: Path
) -> None:
    text = ("--dataset", domains, "--seq-len", "48", "--teacher")
    tiny_model(seed=1).save_pretrained(tmp_path / "bare")
    result = run(model, *text, tmp_path / "bare")
    assert f"Note: --teacher {tmp_path / 'bare'}: the teacher has no tokenizer to compare" in result.stderr
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    other = copy.deepcopy(tiny_tokenizer())
    other.backend_tokenizer.normalizer = Lowercase()
    other.save_pretrained(tmp_path / "other")
    message = refused(model, *text, tmp_path / "other")
    assert f"--teacher {tmp_path / 'other'} has another tokenizer: it makes" in message
