"""Which steps change weights and masks; `test_empty.py` calls this on gloo ranks under torchrun.

`replica_facts.py` is called here too, because starting ranks takes seconds.
"""

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState

from ast_sparse import SparseTrainer, SparsityConfig
from ast_sparse.distributed.pieces import whole
from ast_sparse.distributed.ranks import gather
from ast_sparse.errors import SharedError
from ast_sparse.run.signals import PreemptionSignals
from ast_sparse.run.train import _train
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.storage import files
from ast_sparse.storage.origin import Origin
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


def trainer(folder: Path, ranks: int, steps: int = len(EMPTY) // 2, **values: Any) -> SparseTrainer:
    AcceleratorState._reset_state()
    return SparseTrainer(
        tiny_model(),
        arguments(
            folder, max_steps=steps, per_device_train_batch_size=2 // ranks, weight_decay=0.1,
            train_sampling_strategy="sequential", **values,
        ),
        sparsity_config=SparsityConfig(mask_interval=1, mask_decay=1e-2),
        distillation_config=None,
        train_dataset=Rows(EMPTY),
    )  # fmt: skip


def run(folder: Path, ranks: int, **values: Any) -> dict[str, Any]:
    found, sums = trainer(folder, ranks, **values), Sums()
    found.add_callback(sums)
    found.train()
    losses = [row["loss"] for row in found.state.log_history if "loss" in row]
    return {"sums": sums.sums, "losses": losses}


@contextmanager
def refused_on(rank: int, owner: Any, name: str, part: str = "") -> Iterator[list[str]]:
    """Inside, one rank has no room for what a function writes; afterwards the list has what this rank was told.

    Args:
        part: of the text of the function's first argument; it is only refused with that.
    """
    write, said = getattr(owner, name), list[str]()

    def refused(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == str(rank) and part in str(args[0]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args, **kwargs)

    try:
        with mock.patch.object(owner, name, refused), mock.patch.dict(os.environ):  # FSDP2 sets variables that stay
            yield said
    except SharedError as error:
        said.append(str(error))


def without_room(root: Path) -> dict[str, list[Any]]:
    """For each file that one rank has no room for: what this rank is told, and the checkpoints that are left."""
    found: dict[str, list[Any]] = {}
    sharded: dict[str, Any] = {"fsdp": True}
    for rank, owner, name, part, values in (
        (1, Trainer, "_save_rng_state", "", {}),
        (0, TrainerState, "save_to_json", "", {}),
        (0, RunRecord, "save", "", sharded),
        (1, os, "makedirs", "pytorch_model_fsdp_0", sharded),
        (0, files, "write_json", "shards.json", sharded),
    ):
        folder = root / f"without {name}"
        with refused_on(rank, owner, name, part) as said:
            run(folder, 2, save_strategy="steps", save_steps=2, **values)
        found[name] = [*said, [path.name for path in folder.glob("checkpoint-*")]]
    return found


def without_room_at_the_end(root: Path) -> dict[str, list[str]]:
    """The same for files of the final save of ast-train."""
    found = {}
    for owner, name, values in ((SparseTrainer, "save_state", {}), (Origin, "complete", {"fsdp": True})):
        command: Any = SimpleNamespace(
            config=SimpleNamespace(evaluation=SimpleNamespace(steps=None)), signals=PreemptionSignals(),
            output=root / "end", checkpoint=None,
        )  # fmt: skip
        with refused_on(0, owner, name) as found[name]:
            _train(command, trainer(command.output, 2, steps=1, **values), mock.Mock(), mock.Mock())
    return found


if __name__ == "__main__":
    root = Path(sys.argv[1])
    facts = {"copies": replica_facts.facts(root)}  # first, because FSDP2 sets environment variables that stay
    facts |= {"full": without_room(root), "full at the end": without_room_at_the_end(root)}
    facts |= {name: run(root / name, 2, **values) for name, values in SETTINGS.items()}
    (root / "facts.json").write_text(json.dumps(gather(facts)))
