"""Runs of ast-train and of SparseTrainer that are resumed with something changed."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner, Result
from transformers import TrainingArguments

from ast_sparse import DistillationConfig, SparseTrainer, SparsityConfig
from ast_sparse.cli.train import main
from tests.models import tiny_model
from tests.training.small_runs import arguments, blocks


def base(root: Path) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(root / "model")},
        "data": {"root": str(root), "train": "text.txt", "eval_share": 0.1, "block_size": 16},
        "sparsity": {"mask_interval": 2},
        "slorb": {"k": 16},
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
            "report_to": "none", "use_cpu": True, "save_steps": 1, "disable_tqdm": True, "logging_steps": 10,
            "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": False}},
        },
        "evaluation": {"datasets": []},
    }  # fmt: skip


def train(root: Path, out: Path, *options: str, tree: dict[str, Any] | None = None) -> Result:
    path = root / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(base(root) if tree is None else tree))
    return CliRunner().invoke(main, ["--config", str(path), "--output-dir", str(out), *options])


def resume(root: Path, out: Path, *settings: str, **kwargs: Any) -> Result:
    options = [part for setting in settings for part in ("--set", setting)]
    return train(root, out, "--resume", str(out / "checkpoint-1"), *options, **kwargs)


def refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return result.stderr.rstrip("\n").splitlines()[-1]


def trainer(folder: Path, model: Any = None, **kwargs: Any) -> SparseTrainer:
    names = {item.name for item in dataclasses.fields(TrainingArguments)}
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    args |= {key: kwargs.pop(key) for key in list(kwargs) if key in names}
    kwargs.setdefault("sparsity_config", SparsityConfig(mask_interval=2, mask_decay=1e-2, decay_schedule="static"))
    kwargs.setdefault("distillation_config", DistillationConfig(alpha=0.5))
    kwargs.setdefault("train_dataset", blocks())
    return SparseTrainer(model or tiny_model(), arguments(folder, **args), **kwargs)
