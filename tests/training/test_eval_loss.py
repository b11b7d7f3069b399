"""The held-out loss is the mean over the tokens of the text, however rows are distributed and filled up."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback

from ast_sparse.training import eval_loss as held_out
from ast_sparse.training.eval_loss import HeldOutLoss
from tests.training.small_runs import blocks, trainer

LABELS = torch.randint(0, 9, (11, 6), generator=torch.Generator().manual_seed(0))
LABELS[2, 1:] = LABELS[7] = -100
LOSSES = torch.rand(11, 6, generator=torch.Generator().manual_seed(1)).masked_fill(LABELS == -100, 0.0)


@pytest.mark.parametrize(
    ("ranks", "size", "split"),
    [(1, 4, False), (2, 4, False), (2, 1, False), (3, 2, False), (4, 8, False), (2, 4, True), (3, 3, True)],
)
def test_every_row_counts_once_as_accelerate_distributes_them(
    ranks: int, size: int, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = []
    monkeypatch.setattr(held_out, "mean_over_ranks", lambda values: sums.append(values) or values)
    for rank in range(ranks):
        plain: Any = DataLoader(range(11), batch_size=size)  # type: ignore[arg-type]
        loader = prepare_data_loader(
            plain, num_processes=ranks, process_index=rank, put_on_device=False, split_batches=split
        )
        args: Any = SimpleNamespace(world_size=ranks, process_index=rank)
        loss = HeldOutLoss(loader, args)
        for rows in loader:
            loss.add(LOSSES[rows].flatten(), LABELS[rows])
        loss.mean()
    total, tokens = torch.stack(sums).sum(0).tolist()
    assert tokens == (LABELS != -100).sum()
    assert total == pytest.approx(LOSSES.double().sum().item(), rel=1e-6)


@pytest.mark.parametrize("has_domains", [False, True])
def test_rows_of_few_labels_count_by_their_tokens(tmp_path: Path, has_domains: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 100, (5, 16), generator=generator)
    labels = ids.clone()
    labels[1, 2:] = labels[4, :9] = -100
    rows: Any = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    if has_domains:  # of three rows with 47 tokens that count, and of two with 8
        rows = {"a": rows.select([0, 2, 3]), "b": rows.select([1, 4])}
    run = trainer(tmp_path, eval_dataset=rows, args={"per_device_eval_batch_size": 2, "dataloader_drop_last": True})
    metrics = run.evaluate()
    with torch.no_grad():
        log_p = torch.log_softmax(run.model.eval()(ids).logits[:, :-1].double(), -1)
    counted = labels[:, 1:] != -100
    expected = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)[counted].mean().item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    named = run.evaluate(metric_key_prefix="test")
    if not has_domains:
        named |= run.predict(rows, metric_key_prefix="predicted").metrics
        assert named["predicted_loss"] == metrics["eval_loss"]
        assert named["predicted_perplexity"] == metrics["eval_perplexity"]
    assert named["test_perplexity"] == metrics["eval_perplexity"]


def test_early_stopping_gets_the_loss_over_all_parts(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_dataset={"a": blocks(2), "b": blocks(2, seed=1)},
        args={"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "max_steps": 4},
        callbacks=[EarlyStoppingCallback(1, early_stopping_threshold=1e9)],  # nothing is an improvement
    )
    run.train()
    assert run.state.global_step == 2


def test_without_a_batch_there_is_no_loss() -> None:
    args: Any = SimpleNamespace(world_size=1, process_index=0)
    assert HeldOutLoss(DataLoader([1]), args).mean() is None  # type: ignore[arg-type]
