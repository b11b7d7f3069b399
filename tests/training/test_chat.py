"""Training on chat data: from a file by ast-train's run, from a data set in the notebook, and a batch of prompts."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from ast_sparse import SparseTrainer
from ast_sparse.config import load_config
from ast_sparse.run.train import run_training
from tests.data.chats import ROWS, tokenizer
from tests.models import tiny_model
from tests.training.small_runs import arguments


def test_a_run_on_a_file_of_conversations_measures_what_is_counted(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"messages": ROWS[index % 3], "id": index} for index in range(60)]
    rows = [{**row, "messages": [*row["messages"], {"role": "user", "content": f"{row['id']}"}]} for row in rows]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"root": str(tmp_path), "train": ["chat.jsonl"], "eval_share": 0.2, "block_size": 32},
        "sparsity": {"mask_interval": 1},
        "training": {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    run_training(load_config(tmp_path / "run.yaml"), str(tmp_path / "run"), echo=lambda line: None)
    stages = json.loads((tmp_path / "run" / "results.json").read_text())
    for stage in ("dense", "retrained 2:4"):
        figures = stages[stage]["heldout"]
        assert 0 < figures["predicted_tokens"] < figures["windows"] * 31 / 2


def test_the_loss_is_the_mean_over_what_is_counted(tmp_path: Path) -> None:
    data = Dataset.from_dict({"messages": ROWS * 4})
    args = arguments(tmp_path)
    run = SparseTrainer(
        tiny_model(), args, distillation_config=None, train_dataset=data, processing_class=tokenizer(), block_size=16
    )
    batch = run.data_collator([run.train_dataset[index] for index in range(4)])
    counted = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        log_p = run.model(input_ids=batch["input_ids"]).logits.double().log_softmax(-1)
        expected = -log_p[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0][counted].mean()
        loss = run.compute_loss(run.model, dict(batch), num_items_in_batch=counted.sum())
    assert 0 < counted.sum() < counted.numel() and float(loss) == pytest.approx(float(expected), rel=1e-5)
