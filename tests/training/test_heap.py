from pathlib import Path

import pytest
import torch

from ast_sparse.training import heap
from tests.models import tiny_model
from tests.training.test_trainer import trainer


def test_freed_memory_is_given_back_twice_a_micro_batch_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: calls.append)
    heap.give_back(torch.device("meta"))
    run = trainer(tmp_path, tiny_model("llama"), args=dict(max_steps=3, gradient_accumulation_steps=1))
    assert calls == []
    run.train()
    assert calls == [0] * 6
    ids = torch.ones(1, 8, dtype=torch.long)
    run.model.eval()
    run.compute_loss(run.model, {"input_ids": ids, "labels": ids})
    assert len(calls) == 6


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.give_back(torch.device("cpu"))
