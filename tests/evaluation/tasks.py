"""Tasks of the LM Evaluation Harness that are made of local files."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.models import generated_text


def _rows(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> Path:
    """A task file, and its questions beside it."""
    data = _rows(folder, name, rows)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": data, "test": data}},
        "test_split": "test",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / f"{name}.yaml"


def choice_task(folder: Path, name: str, questions: int = 8, seed: int = 0) -> Path:
    """Which of three sentences continues the text? The answers are arbitrary."""
    rng = random.Random(seed)
    rows = [
        {
            "question": generated_text(2, seed * 100 + index),
            "choices": [generated_text(1, seed * 100 + index + 1000 * choice) for choice in (1, 2, 3)],
            "answer": rng.randrange(3),
        }
        for index in range(questions)
    ]
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return write_task(
        folder,
        name,
        rows,
        output_type="multiple_choice",
        training_split="train",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=metrics,
    )


def answer_task(folder: Path, name: str, **settings: Any) -> Path:
    """Twelve questions that a model answers with text."""
    return write_task(
        folder,
        name,
        [{"question": generated_text(1, seed), "answer": f"#### {seed}"} for seed in range(12)],
        output_type="generate_until",
        training_split="train",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **settings,
    )


def perplexity_task(folder: Path, name: str, documents: Sequence[str]) -> Path:
    """Perplexity of documents, as the harness's own `wikitext`."""
    return write_task(
        folder,
        name,
        [{"text": document} for document in documents],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )


def group(folder: Path, name: str, tasks: Sequence[str], metric: str | None = "acc") -> Path:
    """A group of tasks, with a mean over their questions if there is a metric."""
    config: dict[str, Any] = {"group": name, "task": list(tasks)}
    if metric is not None:
        config["aggregate_metric_list"] = [{"metric": metric, "aggregation": "mean", "weight_by_size": True}]
    (folder / f"{name}.yaml").write_text(json.dumps(config))
    return folder / f"{name}.yaml"
