"""Requests of tasks, caught before a model answers them."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from tests.evaluation.asking import Requests


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    """Requests as they reach the model; answering draws random numbers."""
    requests: Requests = []

    def likelihoods(self: HFLM, instances: list[Any], **_: Any) -> list[tuple[float, bool]]:
        requests.extend(instance.args for instance in instances)
        return [(-random.random() - np.random.rand() - float(torch.rand(())), False) for _ in instances]

    def answers(self: HFLM, instances: list[Any], **_: Any) -> list[str]:
        requests.extend((*instance.args, float(torch.rand(()))) for instance in instances)  # as sampling draws
        return ["#### 3" for _ in instances]

    monkeypatch.setattr(HFLM, "loglikelihood", likelihoods)
    monkeypatch.setattr(HFLM, "generate_until", answers)
    yield requests
