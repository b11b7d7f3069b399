"""Batches of blocks whose order does not depend on processes, micro-batches or workers, and its state in a checkpoint.

accelerate's loader fetches batches ahead of time, and fills up the last one with blocks already used. This one
fetches a batch when it is trained on, so shares that change at an evaluation take effect at the next step.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments

from ast_sparse.config import MixtureConfig
from ast_sparse.data.blocks.domains import DomainBlocks, Mixture
from ast_sparse.data.blocks.stored import TokenBlocks
from ast_sparse.errors import UserError, shown
from ast_sparse.storage.files import read_json, write_json
from ast_sparse.training.resume.checkpoints import RUN_RECORD

DATA_STATE = "data_state.json"
_REFUSED = {  # fields of TrainingArguments that would change the order of blocks
    "train_sampling_strategy": ("random", "blocks have their own order. Remove it."),
    "ignore_data_skip": (False, "blocks that were used would be used again. Remove it; skipping them takes no time."),
}


_SAME = {  # between a checkpoint and the run that resumes it
    "seed": "training.data_seed, or training.seed,",
    "batch": "The sequences of a step, per_device_train_batch_size x gradient_accumulation_steps x processes,",
    "domains": "The number of training blocks",
    "fingerprints": "The training text",
    "update": "A share or target of data.domains, or data.update,",
}


class BlockBatches:
    """A batch sampler: the indices of this process, micro-batch by micro-batch.

    Args:
        offsets: where each domain begins in the data set, int64 `[domains]`.
    """

    def __init__(self, mixture: Mixture, offsets: np.ndarray, args: TrainingArguments) -> None:
        self.mixture = mixture
        self.offsets = offsets
        self.batch_size = args.train_batch_size
        self.accumulation = args.gradient_accumulation_steps
        self.ranks, self.rank = args.world_size, args.process_index
        self.steps_in_epoch = -(-int(mixture.blocks.sum()) // mixture.batch)
        self._epoch = 0

    @property
    def batch_sampler(self) -> "BlockBatches":
        """Itself: Trainer sets the epoch on the sampler inside a wrapper, which it looks up by this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start at this epoch; an epoch is the steps that use as many blocks as there are."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.steps_in_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * self.steps_in_epoch
        for step in range(first, first + self.steps_in_epoch):
            domains, blocks = self.mixture.samples(step)
            indices = self.offsets[domains] + blocks
            for micro in range(self.accumulation):
                start = (micro * self.ranks + self.rank) * self.batch_size
                yield indices[start : start + self.batch_size].tolist()


def block_source(train_dataset: Any) -> dict[str, Any] | None:
    """The domains of a data set that this loader serves, a single one for shards without domains; None for others."""
    if isinstance(train_dataset, DomainBlocks):
        return train_dataset.parts
    return {"train": train_dataset} if isinstance(train_dataset, TokenBlocks) else None


def make_mixture(parts: dict[str, Any], shares: Mapping[str, float] | None, args: TrainingArguments) -> Mixture:
    """The order of the blocks of a run, from `training.data_seed`, or else `training.seed`.

    Args:
        shares: by domain; None: in proportion to the blocks of each.

    Raises:
        UserError: a setting asks for a different order.
    """
    for key, (default, reason) in _REFUSED.items():
        if (value := getattr(args, key)) != default:
            raise UserError(f"training.{key}={shown(getattr(value, 'value', value))}: {reason}")
    blocks = {name: len(part) for name, part in parts.items()}
    total = sum(blocks.values())
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    seed = args.seed if args.data_seed is None else args.data_seed
    shares = shares or {name: count / total for name, count in blocks.items()}
    return Mixture(blocks, [shares[name] for name in blocks], seed, batch)


def block_loader(dataset: Any, mixture: Mixture, collator: Any, args: TrainingArguments) -> DataLoader[Any]:
    """The training loader; tokens are read in this process, whatever `dataloader_num_workers` says."""
    offsets = dataset.offsets if isinstance(dataset, DomainBlocks) else np.zeros(1, dtype=np.int64)
    batches: Any = BlockBatches(mixture, offsets, args)
    return DataLoader(_Rows(dataset), batch_sampler=batches, collate_fn=collator, pin_memory=args.dataloader_pin_memory)


class _Rows(Dataset[Any]):
    """A sequence as a torch data set."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def save_data_state(folder: Path, mixture: Mixture, config: MixtureConfig, parts: dict[str, Any]) -> None:
    """Write what a resumed run needs to continue at the next block."""
    write_json(folder / DATA_STATE, {"format_version": 1, **_state(mixture, config, parts)})


def _state(mixture: Mixture, config: MixtureConfig, parts: dict[str, Any]) -> dict[str, Any]:
    fingerprints = {name: _fingerprint(part) for name, part in parts.items()}
    return {**mixture.state(), "fingerprints": fingerprints, "update": config.to_dict()}


def load_data_state(folder: Path, mixture: Mixture, config: MixtureConfig, parts: dict[str, Any]) -> None:
    """Load the history of the shares from a checkpoint.

    Raises:
        UserError: the file is missing or damaged, or the resumed run has a different text, seed, batch or share.
    """
    path = folder / DATA_STATE
    if not path.is_file():
        raise UserError(
            f"{str(folder)!r} has no {DATA_STATE}: its run read other data. Resume with the data of that run."
        )
    saved = read_json(path)
    ours = _state(mixture, config, parts)
    is_recorded = (folder / RUN_RECORD).is_file()  # it has a fingerprint of the text, wherever it is stored
    for key, what in _SAME.items():
        if key == "fingerprints" and is_recorded:
            continue
        if key in saved and json.dumps(saved[key]) != json.dumps(ours[key]):  # the order of domains matters too
            values = f" ({ours[key]} instead of {shown(saved[key])})" if isinstance(ours[key], int) else ""
            text = f" (blocks of data.train or data.domains: {ours[key]}, stored: {shown(saved[key])})"
            text = text if key == "domains" else ""
            raise UserError(
                f"{what}{values} differs from {str(folder)!r}: blocks would be repeated or left out. Resume with the "
                f"settings and the text of the run{text}."
            )
    try:
        mixture.load_history(saved)
        if saved["format_version"] != 1 or not all(key in saved for key in ours):
            raise ValueError(saved["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged. Resume from another checkpoint.") from error


def _fingerprint(part: Any) -> str:
    return str(getattr(part, "fingerprint", None) or getattr(part, "_fingerprint", ""))
