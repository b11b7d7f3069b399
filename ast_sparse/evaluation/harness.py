"""Tasks of the LM Evaluation Harness, through its Python interface, on a model that is loaded already.

`lm-eval` is an optional package (extra `harness`). The model is passed as an object, so whatever
`storage.load.load_causal_lm` reads is evaluated as it is: compressed checkpoints, SLoRB adapters, `.gguf` files.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ast_sparse.errors import UserError, did_you_mean, one_line
from ast_sparse.evaluation.perplexity import check_window, named_positions
from ast_sparse.evaluation.prompts import PromptFormat

logger = logging.getLogger(__name__)
_PYTHON_SEED, _SEED = 0, 1234  # the harness's own seeds: Python's generator, and all others


@dataclass(frozen=True)
class PublishedTask:
    """A task as the paper reports it (Sec. 7): name in the harness, examples before the question, metric."""

    name: str
    num_fewshot: int
    metric: str


GROUPS = {
    "paper": tuple(
        PublishedTask(name, 0, "acc")
        for name in ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
    ),
    "paper-fewshot": (
        PublishedTask("mmlu", 5, "acc"),
        PublishedTask("minerva_math", 4, "exact_match"),  # MATH
        PublishedTask("gsm8k", 5, "exact_match,strict-match"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One metric of one task, or of a group of tasks.

    Attributes:
        num_fewshot: examples before each question, None for a group or a mean whose tasks differ.
        metric: as the harness calls it; a filter of the answers follows after a comma: `exact_match,strict-match`.
        stderr: standard error of `value`, None if the harness has none.
        examples: questions that were asked.
        shown: whether the task and the metric were asked for. The tasks inside a group, and the metrics that the
            paper does not report, are only in the record.
        prompt: how questions are put, None for plain text; results are comparable only if it is the same.
    """

    task: str
    num_fewshot: int | None
    metric: str
    value: float
    stderr: float | None
    examples: int | None
    shown: bool
    prompt: str | None = None

    def fault(self) -> str | None:
        """What makes the value useless; None for a number. A standard error may be missing."""
        return "its value is not a number" if math.isnan(self.value) else None


class Harness:
    """Tasks, which are found, and their data read, before any model is loaded.

    Every model gets the same requests, those of `lm_eval.simple_evaluate` for the name alone: each name begins with the
    same seeds, whatever was measured before.

    Args:
        names: of tasks, groups or tags of the harness, paths of task files (YAML), `paper` or `paper-fewshot`.
        include_path: a folder with further task files.
        num_fewshot: examples before each question; None: as published for the paper's tasks, or the task's own. A
            task whose file says 0 keeps 0, as in the harness.
        prompts: whether a chat template is applied, and how.

    Raises:
        UserError: the package is missing, a task is unknown, or its data cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        prompts: PromptFormat | None = None,
    ) -> None:
        self.prompts = prompts or PromptFormat()
        self._lm_eval = _import()
        published = [task for name in names for task in GROUPS.get(name, ())]
        wanted = [each for name in names for each in ([task.name for task in GROUPS.get(name, ())] or [name])]
        self._loaded: dict[str, Any] = {}
        self._random: dict[str, _RandomState] = {}  # after its data was read
        self._asked: dict[tuple[Any, ...], str] = {}  # fingerprints of requests
        with _quiet(), _random_state_kept():
            self._manager = _manager(wanted, include_path)
            for name in dict.fromkeys(wanted):
                _seed()
                self._loaded[name] = self._load(name)
                self._random[name] = _RandomState.now()
        self._metrics = {task.name: task.metric for task in published}
        fewshot = {task.name: task.num_fewshot for task in published}
        for name, loaded in self._loaded.items():
            for task in loaded["tasks"].values():
                own = task.get_config("num_fewshot")
                number = fewshot.get(name, own or 0) if num_fewshot is None else num_fewshot if own != 0 else 0
                task.set_config(key="num_fewshot", value=number)
        self._seven = tuple(task.name for task in GROUPS["paper"]) if "paper" in names else ()

    def _load(self, name: str) -> Any:
        try:
            return self._manager.load([name])
        except Exception as error:  # whatever its YAML, its code, its data set and the hub raise
            reason = one_line(error, 300, cut="word", end="mark")
            raise UserError(
                f"--tasks {name} cannot be loaded: {reason} The harness takes most data from the hub: check the "
                "network, or the files that the task names."
            ) from error

    def _begin(self, name: str) -> None:
        """Set every generator to its state in the harness before the first question."""
        _seed()  # those of GPUs too
        self._random[name].restore()
        for task in self._loaded[name]["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)

    def _check_requests(self, name: str, *settings: Any) -> None:
        """Check that a model was asked what the models before it were asked."""
        digest = hashlib.sha256()
        for task in self._loaded[name]["tasks"].values():
            for request in task.instances:
                digest.update(repr((request.request_type, request.args)).encode())
        if self._asked.setdefault((name, *settings), digest.hexdigest()) != digest.hexdigest():
            raise UserError(
                f"--tasks {name}: this model gets different questions from the one before it: the code of the task has "
                "its own random generator. Measure one model at a time."
            )

    def _warn_of_dropped(self, name: str, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        described = any(task.get_config("description") for task in self._loaded[name]["tasks"].values())
        if described and (fault := self.prompts.drops_system(tokenizer, template)):
            logger.warning(
                f"--tasks {name}: its description is left out, as in the harness: the chat template {fault}."
            )

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int | None = None,
        batch_size: int = 1,
        max_length: int | None = None,
    ) -> list[TaskResult]:
        """Evaluate a model, on its device and in its dtype, in eval mode.

        Args:
            limit: how many questions of every task to ask, from the first on; None: all.
            batch_size: questions at a time.
            max_length: most tokens the model is given; None: its positions, or the harness's default if it has no
                limit.

        Raises:
            UserError: a task fails on its data or on the model, `max_length` is more than its positions, or the
                tokenizer does not have the chat template.
        """
        from lm_eval.models.huggingface import HFLM

        if max_length is not None:
            check_window(model.config, max_length)
        else:
            max_length = named_positions(model.config)  # the harness does not know every family's name for them
        template = self.prompts.template(tokenizer)
        results: list[TaskResult] = []
        with _quiet(), _random_state_kept():
            # The harness may add a padding token to the tokenizer.
            lm = HFLM(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                max_length=max_length,
                chat_template_args=None if template is None else {"chat_template": template},
            )
            for name in self._loaded:
                results += self._evaluate(name, lm, model, tokenizer, limit)
        return results + _mean(results, self._seven)

    def _evaluate(
        self, name: str, lm: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int | None
    ) -> list[TaskResult]:
        template = self.prompts.template(tokenizer)
        loaded = self._loaded[name]
        self._begin(name)
        with _nan_seen(model) as seen:
            try:
                record = self._lm_eval.evaluate(
                    lm,
                    loaded,
                    limit=limit,
                    log_samples=False,
                    apply_chat_template=template is not None,
                    fewshot_as_multiturn=self.prompts.multiturn,
                    system_instruction=self.prompts.system_instruction,
                )
            except Exception as error:
                raise UserError(f"--tasks {name}: {one_line(error, 300, cut='word', end='mark')}") from error
        self._check_requests(name, limit, None if template is None else (template, str(tokenizer.special_tokens_map)))
        if template is not None:
            self._warn_of_dropped(name, tokenizer, template)
        rows = _results(name, loaded, record, self._metrics.get(name), self.prompts.described(tokenizer))
        if seen():  # otherwise the first choice, or what greedy decoding makes of NaN, would be scored
            rows = [replace(row, value=math.nan, stderr=None) for row in rows]
        return rows


@dataclass(frozen=True)
class _RandomState:
    """The random generators that a task may draw from, besides its own."""

    python: Any
    numpy: Any
    torch: torch.Tensor

    @classmethod
    def now(cls) -> _RandomState:
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state())

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)


def _seed() -> None:
    random.seed(_PYTHON_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave the generators of the process as they were."""
    before = _RandomState.now()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        before.restore()


def _import() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        reason = one_line(error, 300, cut="word", end="mark")
        raise UserError(
            f"--tasks needs the LM Evaluation Harness ({reason}) Install it: pip install 'ast-sparse[harness]'."
        ) from error
    return lm_eval


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """A task manager that knows all names; the harness's own tasks are indexed only if needed: that takes seconds."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise UserError(f"--include-path {include_path} is not a folder. Name the folder with the task files.")
    folders = [] if include_path is None else [str(Path(include_path).expanduser())]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if _unknown(names, manager):
        manager = TaskManager(include_path=folders)
    if unknown := _unknown(names, manager):
        near = did_you_mean(unknown[0], [*manager.all_tasks, *GROUPS], quoted=str)
        hint = near or "`lm_eval ls tasks` lists the names."
        raise UserError(f"--tasks {unknown[0]}: neither a task of the harness nor a task file. {hint}")
    return manager


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    known = set(manager.all_tasks)
    return [name for name in names if name not in known and not Path(name).expanduser().is_file()]


def _results(name: str, loaded: Any, record: Any, published: str | None, prompt: str | None) -> list[TaskResult]:
    """All results of one name. Those of the name itself are shown, only the published metric if there is one."""
    found = record["results"]
    inner = {child for children in record.get("group_subtasks", {}).values() for child in children}
    top = [task for task in found if task not in inner]
    if not any(_metrics(found[task]) for task in top):  # a group without its own results
        top = list(found)
    rows = []
    for task, row in found.items():
        for key in _metrics(row):
            metric = key.removesuffix(",none")
            stderr = row.get(_stderr_key(key))
            rows.append(
                TaskResult(
                    task=task,
                    num_fewshot=record["n-shot"].get(task),  # the harness leaves out groups whose tasks differ
                    metric=metric,
                    value=float(row[key]),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    examples=row.get("sample_len"),
                    shown=task in top and published in (None, metric),
                    prompt=prompt,
                )
            )
    return rows


def _metrics(row: Any) -> list[str]:
    """Keys of a row that are metrics: `acc,none`, but not `acc_stderr,none` or `alias`."""
    return [
        key
        for key, value in row.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _stderr_key(key: str) -> str:
    metric, _, kind = key.partition(",")
    return f"{metric}_stderr,{kind}"


def _mean(results: Sequence[TaskResult], names: Sequence[str]) -> list[TaskResult]:
    """The paper's mean over its seven tasks, all with the same weight."""
    rows = [row for row in results if row.shown and row.task in names]
    if not rows:
        return []
    variances = [row.stderr**2 for row in rows if row.stderr is not None]
    stderr = math.sqrt(sum(variances)) / len(rows) if len(variances) == len(rows) else None
    return [
        TaskResult(
            task="mean",
            num_fewshot=rows[0].num_fewshot if len({row.num_fewshot for row in rows}) == 1 else None,
            metric=rows[0].metric,
            value=sum(row.value for row in rows) / len(rows),
            stderr=stderr,
            examples=None,
            shown=True,
            prompt=rows[0].prompt,
        )
    ]


@contextmanager
def _nan_seen(model: PreTrainedModel) -> Iterator[Callable[[], bool]]:
    """A function that says whether the model has computed NaN for the last token of a sequence."""
    found = torch.zeros((), dtype=torch.bool, device=model.device)

    def look(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        found.logical_or_(torch.isnan(output.logits[:, -1]).any().to(found.device))

    handle = model.register_forward_hook(look)
    try:
        yield lambda: bool(found)
    finally:
        handle.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the harness's hints to people who call it from code."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
