"""Tasks of the LM Evaluation Harness, made of local files, against the harness itself and against plain loops."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from ast_sparse.errors import UserError
from ast_sparse.evaluation.harness import GROUPS, Harness, TaskResult
from ast_sparse.evaluation.measure import measure_text
from ast_sparse.evaluation.results import tasks_table
from tests.evaluation.tasks import choice_task, group, perplexity_task, write_task
from tests.models import generated_text, tiny_model, tiny_tokenizer

DOCUMENTS = [generated_text(count, seed) for seed, count in enumerate((3, 6, 1))]


def values(results: list[TaskResult], *, shown: bool = True) -> dict[tuple[str, str], float]:
    return {(row.task, row.metric): row.value for row in results if row.shown or not shown}


def run(harness: Harness, model: PreTrainedModel | None = None, **options: Any) -> list[TaskResult]:
    return harness(model or tiny_model(), tiny_tokenizer(), **options)


def loss_of(model: PreTrainedModel, tokens: list[int], first: int) -> float:
    """−log p of the tokens from `first` on, in float64."""
    with torch.no_grad():
        log_p = model.double().eval()(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return -sum(float(log_p[at - 1, tokens[at]]) for at in range(first, len(tokens)))


def tokens_of(text: str) -> list[int]:
    return tiny_tokenizer().encode(text, add_special_tokens=False)


def test_accuracy_equals_a_plain_loop(tmp_path: Path) -> None:
    file = choice_task(tmp_path, "mine")
    correct = []
    for line in (tmp_path / "mine.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = tokens_of(row["question"])
        losses = [
            loss_of(tiny_model("qwen2"), tokens_of(f"{row['question']} {choice}"), len(question))
            for choice in row["choices"]
        ]
        correct.append(losses.index(min(losses)) == row["answer"])
    results = run(Harness([str(file)]), tiny_model("qwen2"))
    assert values(results)["mine", "acc"] == sum(correct) / len(correct)
    (row,) = [row for row in results if row.metric == "acc"]
    p = row.value
    assert row.stderr == pytest.approx(math.sqrt(p * (1 - p) / (len(correct) - 1)))
    assert (row.examples, row.num_fewshot) == (len(correct), 0)


def test_results_are_those_of_the_harness(tmp_path: Path) -> None:
    choice_task(tmp_path, "mine")
    perplexity_task(tmp_path, "text", DOCUMENTS)
    lm = HFLM(pretrained=tiny_model(), tokenizer=tiny_tokenizer())
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    record = lm_eval.simple_evaluate(model=lm, tasks=["mine", "text"], task_manager=manager, num_fewshot=2)
    harness = Harness(["mine", "text"], include_path=str(tmp_path), num_fewshot=2)
    for _ in range(2):  # the tasks serve one model after the other
        ours = values(run(harness))
        for (task, metric), value in ours.items():
            assert value == record["results"][task][f"{metric},none"]
        assert {metric for _, metric in ours} == {
            "acc",
            "acc_norm",
            "word_perplexity",
            "byte_perplexity",
            "bits_per_byte",
        }
    assert {row.num_fewshot for row in run(harness) if row.task == "mine"} == {2}


def test_perplexity_task_agrees_with_separate_documents_and_a_plain_loop(tmp_path: Path) -> None:
    # The harness puts the end-of-text token before each document and scores all of its tokens; here a document's first
    # token is context only, so with that token before it both score the same tokens, over the same bytes.
    perplexity_task(tmp_path, "text", DOCUMENTS)
    theirs = values(run(Harness([str(tmp_path / "text.yaml")])))["text", "bits_per_byte"]
    eos = tiny_tokenizer().eos_token
    ours = measure_text(
        tiny_model(), tiny_tokenizer(), [eos + document for document in DOCUMENTS], 128, join="separate", progress=False
    )
    assert ours.scored_bytes == sum(len(document.encode()) for document in DOCUMENTS)
    assert ours.bits_per_byte == pytest.approx(theirs, rel=1e-6)
    losses = [loss_of(tiny_model(), tokens_of(eos + document), 1) for document in DOCUMENTS]
    assert theirs == pytest.approx(sum(losses) / math.log(2) / ours.scored_bytes, rel=1e-5)
    assert values(run(Harness([str(tmp_path / "text.yaml")])))["text", "byte_perplexity"] == pytest.approx(2**theirs)


def test_perplexity_task_without_its_first_tokens_is_the_plain_perplexity(tmp_path: Path) -> None:
    perplexity_task(tmp_path, "text", DOCUMENTS[:1])
    theirs = values(run(Harness([str(tmp_path / "text.yaml")])))["text", "bits_per_byte"]
    ours = measure_text(tiny_model(), tiny_tokenizer(), DOCUMENTS[:1], 128, join="separate", progress=False)
    tokens = tokens_of(tiny_tokenizer().eos_token + DOCUMENTS[0])
    total = theirs * math.log(2) * len(DOCUMENTS[0].encode())
    rest = loss_of(tiny_model(), tokens, 2)
    assert total - rest == pytest.approx(loss_of(tiny_model(), tokens[:2], 1), rel=1e-4)
    assert ours.mean_nll * ours.predicted_tokens == pytest.approx(loss_of(tiny_model(), tokens[1:], 1), rel=1e-5)


def test_a_long_document_agrees_by_overlapping_windows(tmp_path: Path) -> None:
    # At L tokens the harness predicts L at a time, each time from one more: windows of L + 1 that begin L apart.
    tokens = tokens_of(generated_text(60))
    document = tiny_tokenizer().decode(tokens[: 32 * (len(tokens) // 32)])
    perplexity_task(tmp_path, "text", [document])
    results = run(Harness([str(tmp_path / "text.yaml")]), max_length=32, batch_size=3)
    ours = measure_text(
        tiny_model(), tiny_tokenizer(), [tiny_tokenizer().eos_token + document], 33, stride=32, progress=False
    )
    assert ours.bits_per_byte == pytest.approx(values(results)["text", "bits_per_byte"], rel=1e-6)


def test_limit_and_batches(tmp_path: Path) -> None:
    file = str(choice_task(tmp_path, "mine"))
    (row, _) = run(Harness([file]), limit=3)
    assert row.examples == 3
    assert values(run(Harness([file]), batch_size=4)) == values(run(Harness([file])))


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    harness = Harness([str(choice_task(tmp_path, "mine"))])
    with pytest.raises(UserError, match="longer than the model's 128 positions"):
        run(harness, max_length=129)


def test_group_shows_its_mean_and_records_its_tasks(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        choice_task(tmp_path, name, 4 + seed, seed)
    group(tmp_path, "both", ["a", "b"])
    group(tmp_path, "bare", ["a", "b"], None)
    results = run(Harness(["both"], include_path=str(tmp_path)))
    assert set(values(results)) == {("both", "acc")}
    every = values(results, shown=False)
    assert every["both", "acc"] == pytest.approx((4 * every["a", "acc"] + 5 * every["b", "acc"]) / 9)
    assert {task for task, _ in values(run(Harness(["bare"], include_path=str(tmp_path))))} == {"a", "b"}


@pytest.mark.parametrize("number", [2, 0])
def test_a_group_has_a_number_of_examples_only_if_its_tasks_agree(tmp_path: Path, number: int) -> None:
    rows = [{"question": generated_text(1, seed), "choices": ["a", "b"], "answer": 0} for seed in range(4)]
    for name, examples in (("one", 2), ("other", number)):
        write_task(
            tmp_path, name, rows, output_type="multiple_choice", training_split="train", num_fewshot=examples,
            doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="{{answer}}",
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        )  # fmt: skip
    group(tmp_path, "both", ["one", "other"])
    found = run(Harness(["both"], include_path=str(tmp_path)), limit=1)
    of_group = 2 if number == 2 else None
    assert {row.task: row.num_fewshot for row in found} == {"both": of_group, "one": 2, "other": number}
    row = next(row for row in found if row.task == "both")
    assert tasks_table([("m", "float32", row)]).splitlines()[2].split()[3] == ("2" if number else "-")


def test_paper_tasks_are_asked_as_published(tmp_path: Path) -> None:
    for seed, task in enumerate(GROUPS["paper"]):
        choice_task(tmp_path, task.name, 4, seed)
    results = run(Harness(["paper"], include_path=str(tmp_path)))
    shown = values(results)
    assert list(shown) == [*((task.name, "acc") for task in GROUPS["paper"]), ("mean", "acc")]
    assert shown["mean", "acc"] == pytest.approx(sum(list(shown.values())[:7]) / 7)
    assert {row.num_fewshot for row in results} == {0}
    assert ("rte", "acc_norm") in values(results, shown=False)


def test_paper_fewshot_tasks_have_their_examples_and_metrics(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two", "algebra")):
        choice_task(tmp_path, name, 8, seed)
    group(tmp_path, "mmlu", ["one", "two"])
    group(tmp_path, "minerva_math", ["algebra"], "acc_norm")
    write_task(
        tmp_path,
        "gsm8k",
        [{"question": generated_text(1, seed), "answer": "#### 3"} for seed in range(6)],
        output_type="generate_until",
        training_split="train",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 4},
        filter_list=[{"name": "strict-match", "filter": [{"function": "take_first"}]}],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    results = run(Harness(["paper-fewshot"], include_path=str(tmp_path)), limit=2)
    assert {row.task: row.num_fewshot for row in results} == {
        "mmlu": 5, "one": 5, "two": 5, "minerva_math": 4, "algebra": 4, "gsm8k": 5,
    }  # fmt: skip
    assert set(values(results)) == {("mmlu", "acc"), ("gsm8k", "exact_match,strict-match")}


def test_names_of_the_paper_are_tasks_of_the_harness() -> None:
    names = {task.name for tasks in GROUPS.values() for task in tasks}
    files = Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")  # thousands: the harness reads the folders that matter
    named = re.compile(r"^(?:task|group): *(\S+)", re.MULTILINE)
    folders = {str(file.parent) for file in files if names & set(named.findall(file.read_text(encoding="utf-8")))}
    manager = TaskManager(include_path=sorted(folders), include_defaults=False)
    assert names <= set(manager.all_tasks)


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'ast-sparse\[harness\]'") as caught:
        Harness(["paper"])
    assert "\n" not in str(caught.value)


def test_tasks_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    file = choice_task(tmp_path, "mine")
    (tmp_path / "mine.jsonl").unlink()
    (tmp_path / "bad.yml").write_text("task: [")
    (tmp_path / "empty.yml").write_text("a: 1")
    cases = [
        ([str(file)], None, "--tasks .*mine.yaml cannot be loaded: .*mine.jsonl"),
        ([str(tmp_path / "bad.yml")], None, "--tasks .*bad.yml cannot be loaded: "),
        ([str(tmp_path / "empty.yml")], None, "--tasks .*empty.yml cannot be loaded: "),
        (["mine"], str(tmp_path / "no"), "--include-path .*no is not a folder"),
    ]
    for names, folder, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            Harness(names, include_path=folder)
        assert "\n" not in str(caught.value)


def test_unknown_task_is_named_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: _Known(["boolq", "rte"]))
    with pytest.raises(UserError, match=r"--tasks boolqq: neither a task .* Did you mean boolq\?"):
        Harness(["boolqq"])


class _Known:
    def __init__(self, names: list[str]) -> None:
        self.all_tasks = names
