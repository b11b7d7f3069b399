"""What models are asked: the same for each of them, and what the harness itself asks."""

import json
import random
from pathlib import Path

import pytest
import torch

from ast_sparse.errors import UserError
from ast_sparse.evaluation.harness import GROUPS, Harness
from tests.evaluation.asking import Requests, ours, theirs
from tests.evaluation.tasks import answer_task, choice_task, group


def with_code(file: Path, code: str, **functions: str) -> Path:
    """The task, with fields that are functions of a file beside it."""
    (file.parent / f"{file.stem}_code.py").write_text(code)
    config = json.loads(file.read_text())
    config.update({field: "FUNCTION" + name for field, name in functions.items()})
    text = json.dumps(config)
    for name in functions.values():
        text = text.replace(f'"FUNCTION{name}"', f"!function {file.stem}_code.{name}")
    file.write_text(text)
    return file


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("num_fewshot", [None, 0, 2])
def test_every_model_is_asked_what_the_harness_asks(
    asked: Requests, tmp_path: Path, num_fewshot: int | None, limit: int | None
) -> None:
    choice_task(tmp_path, "choice")
    answer_task(tmp_path, "answer", num_fewshot=3)
    harness = Harness(["choice", "answer"], include_path=str(tmp_path), num_fewshot=num_fewshot)
    first, second, third = ours(asked, harness, 3, limit=limit)
    assert first == second == third
    expected = [
        request
        for name in ("choice", "answer")
        for request in theirs(asked, tmp_path, [name], num_fewshot=num_fewshot, limit=limit)
    ]
    assert first == expected


def test_examples_do_not_depend_on_the_order_of_tasks(asked: Requests, tmp_path: Path) -> None:
    choice_task(tmp_path, "a", seed=1)
    answer_task(tmp_path, "b")
    one, other = (
        ours(asked, Harness(names, include_path=str(tmp_path), num_fewshot=2), 1)[0] for names in ("ab", "ba")
    )
    assert sorted(map(repr, one)) == sorted(map(repr, other))


def test_groups_keep_the_number_of_examples_of_each_task(asked: Requests, tmp_path: Path) -> None:
    for name, number in (("none", 0), ("unsaid", None), ("three", 3)):
        answer_task(tmp_path, name, **({} if number is None else {"num_fewshot": number}))
    group(tmp_path, "all", ["none", "unsaid", "three"], None)
    for num_fewshot, counts in ((None, (0, 0, 3)), (2, (0, 2, 2))):  # 0 in the file of a task stays, as in the harness
        harness = Harness(["all"], include_path=str(tmp_path), num_fewshot=num_fewshot)
        first, second = ours(asked, harness)
        assert first == second == theirs(asked, tmp_path, ["all"], num_fewshot=num_fewshot)
        assert [first[12 * task][0].count("####") for task in range(3)] == list(counts)


def test_the_examples_of_the_paper_are_those_of_the_harness(asked: Requests, tmp_path: Path) -> None:
    assert {task.num_fewshot for task in GROUPS["paper-fewshot"]} == {4, 5}
    choice_task(tmp_path, "one", 9)
    choice_task(tmp_path, "two", 9, seed=1)
    group(tmp_path, "mmlu", ["one", "two"])
    answer_task(tmp_path, "algebra", num_fewshot=4)
    group(tmp_path, "minerva_math", ["algebra"], "exact_match")
    answer_task(tmp_path, "gsm8k", num_fewshot=5)
    first, second = ours(asked, Harness(["paper-fewshot"], include_path=str(tmp_path)))
    expected = theirs(asked, tmp_path, ["mmlu"], num_fewshot=5)
    expected += theirs(asked, tmp_path, ["minerva_math"]) + theirs(asked, tmp_path, ["gsm8k"])
    assert first == second == expected


def test_tasks_that_draw_from_the_generators_of_the_process(asked: Requests, tmp_path: Path) -> None:
    code = (
        "import random\nimport numpy, torch\n\n\ndef text(doc):\n"
        "    return f\"{doc['question']} {random.random()} {numpy.random.rand()} {float(torch.rand(()))}\"\n\n\n"
        "def docs(rows):\n    order = list(range(len(rows)))\n    random.shuffle(order)\n"
        "    return rows.select(order)\n"
    )
    with_code(answer_task(tmp_path, "drawn", num_fewshot=1), code, doc_to_text="text", process_docs="docs")
    state = random.getstate(), torch.get_rng_state()
    harness = Harness(["drawn"], include_path=str(tmp_path))
    assert state[0] == random.getstate() and torch.equal(state[1], torch.get_rng_state())
    first, second = ours(asked, harness)
    assert first == second == theirs(asked, tmp_path, ["drawn"])


def test_a_task_with_a_generator_of_its_own_is_refused_for_a_second_model(asked: Requests, tmp_path: Path) -> None:
    code = (
        "import random\nOWN = random.Random(0)\n\n\ndef text(doc):\n    return f\"{doc['question']} {OWN.random()}\"\n"
    )
    with_code(answer_task(tmp_path, "own"), code, doc_to_text="text")
    harness = Harness(["own"], include_path=str(tmp_path))
    ours(asked, harness, 1)
    with pytest.raises(UserError, match=r"--tasks own: this model gets different questions .* one model at a time\."):
        ours(asked, harness, 1)
