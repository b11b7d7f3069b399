"""What models are asked: one after another by ours, and by the harness itself."""

import random
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from ast_sparse.evaluation.harness import Harness
from tests.models import tiny_model, tiny_tokenizer

Requests = list[tuple[Any, ...]]


def ours(
    asked: Requests, harness: Harness, models: int = 2, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> list[Requests]:
    """Requests of one model after another."""
    found = []
    for seed in range(models):
        asked.clear()
        torch.manual_seed(seed)
        harness(tiny_model(), tokenizer or tiny_tokenizer(), **options)
        found.append(list(asked))
        random.random()
    return found


def theirs(
    asked: Requests, folder: Path, names: list[str], tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> Requests:
    asked.clear()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=tiny_model(), tokenizer=tokenizer or tiny_tokenizer())
    with mock.patch("lm_eval.evaluator.add_env_info"):  # lists the installed packages, in a second
        lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, log_samples=False, **options)
    return list(asked)
