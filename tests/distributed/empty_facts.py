"""Which steps change weights and masks; `test_empty.py` calls this on gloo ranks under torchrun.

`replica_facts.py` is called here too, because starting ranks takes seconds.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from ast_sparse import SparseTrainer, SparsityConfig
from ast_sparse.distributed.pieces import whole
from ast_sparse.distributed.ranks import gather
from ast_sparse.sparsity.model import sparse_layers
from tests.distributed import replica_facts
from tests.models import tiny_model
from tests.training.small_runs import Rows, arguments

EMPTY = [False, False, False, True, True, True, True, False, True, True]  # two of them per step, one for each rank
SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "by rank": {"average_tokens_across_devices": False},
    "fsdp": {"fsdp": True},
}


class Sums(TrainerCallback):
    """Sums over weights and masks after every step."""

    def __init__(self) -> None:
        self.sums: list[list[float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = sparse_layers(kwargs["model"]).values()
        place = torch.arange(1, 1 + 10**5, dtype=torch.float64)
        weight = sum(float(whole(layer.weight.detach()).double().abs().sum()) for layer in layers)
        masks = [whole(layer.mask).flatten() for layer in layers]
        self.sums.append([weight, sum(float((mask * place[: len(mask)]).sum()) for mask in masks)])


def run(folder: Path, ranks: int, **values: Any) -> dict[str, Any]:
    AcceleratorState._reset_state()
    found = SparseTrainer(
        tiny_model(),
        arguments(
            folder, max_steps=len(EMPTY) // 2, per_device_train_batch_size=2 // ranks, weight_decay=0.1,
            train_sampling_strategy="sequential", **values,
        ),
        sparsity_config=SparsityConfig(mask_interval=1, mask_decay=1e-2),
        distillation_config=None,
        train_dataset=Rows(EMPTY),
    )  # fmt: skip
    sums = Sums()
    found.add_callback(sums)
    found.train()
    losses = [row["loss"] for row in found.state.log_history if "loss" in row]
    return {"sums": sums.sums, "losses": losses}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    copies = replica_facts.facts(root)  # first, because FSDP2 sets environment variables that stay
    facts = gather({**{name: run(root / name, 2, **values) for name, values in SETTINGS.items()}, "copies": copies})
    (root / "facts.json").write_text(json.dumps(facts))
