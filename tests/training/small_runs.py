"""Small runs of SparseTrainer."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

from ast_sparse import DistillationConfig, SparseTrainer, SparsityConfig
from ast_sparse.sparsity.select import decoder_blocks
from tests.models import VOCAB, tiny_model


def blocks(count: int = 32, size: int = 16, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(0, VOCAB, (count, size), generator=generator).tolist()})


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    defaults = dict(
        output_dir=str(folder), use_cpu=True, max_steps=6, per_device_train_batch_size=4, learning_rate=3e-3,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    return TrainingArguments(**{**defaults, **kwargs})


def trainer(folder: Path, model: Any = None, sparsity: SparsityConfig | None = None, **kwargs: Any) -> SparseTrainer:
    args = kwargs.pop("args", {})
    kwargs.setdefault("distillation_config", DistillationConfig(alpha=0.67))
    kwargs.setdefault("train_dataset", blocks())
    return SparseTrainer(
        tiny_model("llama") if model is None else model,
        arguments(folder, **args),
        sparsity_config=sparsity or SparsityConfig(mask_interval=2, mask_decay=1e-2),
        **kwargs,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def count_passes(model: torch.nn.Module) -> list[int]:
    """Grows by an item at each forward pass of the first decoder block, which activation checkpointing repeats.

    It may repeat the block's `forward` without its hooks, so a layer inside is watched.
    """
    passes: list[int] = []
    block = next(iter(decoder_blocks(model).values()))
    layer = next(module for module in block.modules() if isinstance(module, torch.nn.Linear | Conv1D))
    layer.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes


def padded(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """The same model with more rows, so that its logits are no longer small."""
    torch.manual_seed(1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB:].normal_(0, 2)
    return model


SIZE = 16


class Rows(TorchDataset[Any]):
    """A data set that is not scanned for empty rows, and whose rows are used in order."""

    def __init__(self, is_empty: list[bool]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, VOCAB, (len(is_empty), SIZE), generator=generator).tolist()
        self.is_empty = is_empty

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": [ids[0]] + [-100] * (SIZE - 1) if self.is_empty[index] else ids}
