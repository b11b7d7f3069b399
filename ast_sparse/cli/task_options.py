"""Options of ast-eval for tasks of the LM Evaluation Harness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.evaluation.harness import Harness

ONLY_TASKS = (
    "include_path", "num_fewshot", "batch_size", "apply_chat_template", "fewshot_as_multiturn", "system_instruction",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The parsed options."""

    tasks: str | None
    include_path: str | None
    num_fewshot: int | None
    batch_size: int
    apply_chat_template: str | None
    fewshot_as_multiturn: bool | None
    system_instruction: str | None


_OPTIONS = (
    click.option(
        "--tasks",
        metavar="NAME[,NAME]",
        help="Tasks of the LM Evaluation Harness (ast-sparse[harness]) or their YAML files. paper: BoolQ, RTE, "
        "HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA, zero-shot, acc. paper-fewshot: MMLU 5, MATH 4, GSM8K 5. With "
        "tasks, texts are measured only if --dataset is given.",
    ),
    click.option("--include-path", metavar="DIR", help="Folder with more task files of the harness."),
    click.option(
        "--num-fewshot",
        type=click.IntRange(min=0),
        help="Examples before each question of a task. Default: as the task says. A task whose file says 0 keeps 0.",
    ),
    click.option(
        "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Questions of a task in a batch."
    ),
    click.option(
        "--apply-chat-template",
        is_flag=False,
        flag_value="default",
        metavar="[NAME]",
        help="Format the questions of tasks with the chat template of the tokenizer, or with the template of this "
        "name; for instruct models. Results with and without it are not comparable.",
    ),
    click.option(
        "--fewshot-as-multiturn",
        type=bool,
        is_flag=False,
        flag_value="true",
        metavar="[BOOLEAN]",
        help="With a chat template, examples are turns of the conversation (the default); false: all in one turn.",
    ),
    click.option(
        "--system-instruction",
        metavar="TEXT",
        help="Text before each question of a task; with a chat template, the system message.",
    ),
)


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, in the order above."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def find_harness(settings: TaskSettings) -> Harness | None:
    """The tasks of `--tasks`, with their data read; None without the option.

    Raises:
        UserError: `--tasks` names nothing, or an error of `Harness` or `PromptFormat`.
    """
    if settings.tasks is None:
        return None
    from ast_sparse.evaluation.harness import Harness
    from ast_sparse.evaluation.prompts import PromptFormat

    names = [name.strip() for name in settings.tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks {settings.tasks!r} names no task. Name tasks of the harness, or paper.")
    prompts = PromptFormat(
        apply_chat_template=False if settings.apply_chat_template is None else settings.apply_chat_template,
        fewshot_as_multiturn=settings.fewshot_as_multiturn,
        system_instruction=settings.system_instruction,
    )
    return Harness(names, include_path=settings.include_path, num_fewshot=settings.num_fewshot, prompts=prompts)
