"""Tasks through chat templates: the requests are the harness's own, and results say how they were asked."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from ast_sparse.cli.eval import main
from ast_sparse.errors import UserError
from ast_sparse.evaluation.harness import Harness
from ast_sparse.evaluation.prompts import PromptFormat
from tests.evaluation.asking import Requests, ours, theirs
from tests.evaluation.tasks import answer_task, choice_task
from tests.models import save_tiny_model, tiny_model, tiny_tokenizer

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE = "{{ bos_token }}" + TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
SILENT = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def chat_tokenizer(template: str | dict[str, str] = TEMPLATE) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


def save(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    save_tiny_model(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"apply_chat_template": True},
        {"apply_chat_template": True, "fewshot_as_multiturn": False},
        {"apply_chat_template": True, "system_instruction": "Answer at once."},
        {"apply_chat_template": False, "system_instruction": "Answer at once."},
    ],
)
def test_requests_are_those_of_the_harness(asked: Requests, tmp_path: Path, options: dict[str, Any]) -> None:
    choice_task(tmp_path, "choice")
    answer_task(tmp_path, "answer", description="Count.", gen_prefix="So")
    prompts = PromptFormat(**options)
    harness = Harness(["choice", "answer"], include_path=str(tmp_path), num_fewshot=2, prompts=prompts)
    first, second = ours(asked, harness, tokenizer=chat_tokenizer())
    expected: Requests = []
    for name in ("choice", "answer"):
        expected += theirs(asked, tmp_path, [name], chat_tokenizer(), num_fewshot=2, **options)
    assert first == second == expected
    assert ("<user>" in first[0][0]) == options["apply_chat_template"]
    turns = options["apply_chat_template"] and options.get("fewshot_as_multiturn", True)
    assert (first[0][0].count("<user>") == 3) == turns


def test_the_token_of_the_beginning_stands_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer()
    bos = tokenizer.bos_token_id
    found: list[list[int]] = []

    def likelihoods(self: HFLM, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        found.extend(context + answer for _, context, answer in requests)
        return [(0.0, False) for _ in requests]

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", likelihoods)
    harness = Harness([str(choice_task(tmp_path, "choice"))], prompts=PromptFormat(apply_chat_template=True))
    harness(tiny_model(), tokenizer)
    assert found and all(ids[0] == bos and ids.count(bos) == 1 for ids in found)


def test_a_template_is_chosen_by_its_name(asked: Requests, tmp_path: Path) -> None:
    file = str(choice_task(tmp_path, "choice"))
    tokenizer = chat_tokenizer({"default": TEMPLATE, "short": TURNS.replace("<", "[").replace(">", "]")})
    found = {}
    for name in (True, "default", "short"):
        harness = Harness([file], prompts=PromptFormat(apply_chat_template=name))
        found[name] = ours(asked, harness, 1, tokenizer)[0]
    assert found[True] == found["default"]
    assert "[user]" in found["short"][0][0] and "<user>" not in found["short"][0][0]


def test_models_with_other_templates_are_asked_in_their_own(asked: Requests, tmp_path: Path) -> None:
    harness = Harness([str(choice_task(tmp_path, "choice"))], prompts=PromptFormat(apply_chat_template=True))
    rows = [harness(tiny_model(), chat_tokenizer(template))[0] for template in (TEMPLATE, TURNS)]
    assert rows[0].prompt != rows[1].prompt
    assert str(rows[0].prompt).startswith("chat template default (")


@pytest.mark.parametrize(
    ("options", "template", "message"),
    [
        ({"apply_chat_template": True}, None, "--apply-chat-template: the tokenizer has no chat template"),
        ({"apply_chat_template": "rag"}, TEMPLATE, "rag: the tokenizer has no such chat template, only default. Name"),
        ({"apply_chat_template": True}, {"a": TEMPLATE, "b": TURNS}, "template: .* no such chat template, only a, b"),
        (
            {"apply_chat_template": True, "system_instruction": "So."},
            NO_SYSTEM,
            r"--system-instruction: the chat template takes no system message \(no system role\)",
        ),
        (
            {"apply_chat_template": True, "system_instruction": "So."},
            SILENT,
            "--system-instruction: the chat template leaves system messages out",
        ),
    ],
)
def test_what_a_template_cannot_do_is_refused(options: dict[str, Any], template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        PromptFormat(**options).template(chat_tokenizer(template))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fewshot-as-multiturn",), "--fewshot-as-multiturn needs --apply-chat-template"),
        (("--fewshot-as-multiturn", "true"), "--fewshot-as-multiturn needs --apply-chat-template"),
        (("--apply-chat-template", ""), "--apply-chat-template has an empty name"),
        (("--system-instruction", " "), "--system-instruction has no text"),
        (("--apply-chat-template", "rag"), "rag: the tokenizer has no such chat template, only default"),
        (("--fewshot-as-multiturn", "perhaps"), "'perhaps' is not a valid boolean"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    model = save(tmp_path / "model", chat_tokenizer())
    result = run(model, "--tasks", choice_task(tmp_path, "choice"), *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr.splitlines()[-1]


def test_a_second_model_without_a_template_is_refused_before_the_first_is_measured(tmp_path: Path) -> None:
    chat, plain = save(tmp_path / "chat", chat_tokenizer()), save_tiny_model(tmp_path / "plain")
    result = run(chat, plain, "--tasks", choice_task(tmp_path, "choice"), "--apply-chat-template")
    assert result.exit_code == 2 and result.stdout == ""
    assert f"Error: {plain}: --apply-chat-template: the tokenizer has no chat template" in result.stderr
    assert "--apply-chat-template belongs to --tasks" in run(chat, "--apply-chat-template").stderr


def test_results_say_how_they_were_asked(tmp_path: Path) -> None:
    model = save(tmp_path / "model", chat_tokenizer())
    task = ("--tasks", choice_task(tmp_path, "choice"), "--json", tmp_path / "a.json")
    result = run(model, *task)
    assert result.exit_code == 0 and "prompt" not in result.stdout
    assert {row["prompt"] for row in json.loads((tmp_path / "a.json").read_text())["tasks"]} == {None}
    options = ("--apply-chat-template", "--fewshot-as-multiturn", "false", "--system-instruction", "Go.")
    result = run(model, *task, *options, "--report", tmp_path / "page")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "a.json").read_text())
    (prompt,) = {row["prompt"] for row in record["tasks"]}
    assert prompt.startswith("chat template default (") and "few-shot in one turn, system instruction (" in prompt
    assert prompt in result.stdout and prompt in (tmp_path / "page" / "report.html").read_text()
    assert record["settings"]["apply_chat_template"] == "default"
    assert record["settings"]["fewshot_as_multiturn"] is False
    assert record["settings"]["system_instruction"] == "Go."


def test_a_description_that_a_template_drops_is_reported(
    asked: Requests,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer_task(tmp_path, "answer", description="Count.")
    harness = Harness(["answer"], include_path=str(tmp_path), prompts=PromptFormat(apply_chat_template=True))
    first = ours(asked, harness, 1, chat_tokenizer(NO_SYSTEM))[0]
    assert first == theirs(asked, tmp_path, ["answer"], chat_tokenizer(NO_SYSTEM), apply_chat_template=True)
    assert "--tasks answer: its description is left out, as in the harness: the chat template takes no" in caplog.text
