"""Which steps change weights and masks; `test_empty.py` calls this on gloo ranks under torchrun.

`replica_facts.py` is called here too, because starting ranks takes seconds.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback

from ast_sparse import SparseTrainer, SparsityConfig
from ast_sparse.distributed.pieces import whole
from ast_sparse.distributed.ranks import gather
from ast_sparse.errors import SharedError
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.training.resume.same_run import RunRecord
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


def refused_on(rank: int, owner: type, method: str, folder: Path, **values: Any) -> list[Any]:
    """A save for which one rank has no room: the message that this rank gets, and the checkpoints that are left."""
    write = getattr(owner, method)

    def refused(*args: Any) -> None:
        if os.environ["RANK"] == str(rank):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    try:
        with mock.patch.object(owner, method, refused):
            run(folder, 2, save_strategy="steps", save_steps=2, **values)
    except SharedError as error:
        return [str(error), [path.name for path in folder.glob("checkpoint-*")]]
    return ["no error", []]


if __name__ == "__main__":
    root = Path(sys.argv[1])
    copies = replica_facts.facts(root)  # first, because FSDP2 sets environment variables that stay
    full = {"ddp": refused_on(1, Trainer, "_save_rng_state", root / "full")}
    facts: dict[str, Any] = {name: run(root / name, 2, **values) for name, values in SETTINGS.items()}
    full["fsdp"] = refused_on(0, RunRecord, "save", root / "full, sharded", fsdp=True)
    (root / "facts.json").write_text(json.dumps(gather({**facts, "copies": copies, "full": full})))
