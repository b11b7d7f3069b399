"""Blocks come in one order, however many processes, micro-batches and workers share them, and after a resume."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import skip_first_batches

from ast_sparse.config import MixtureConfig
from ast_sparse.data.blocks.domains import DomainBlocks, Mixture
from ast_sparse.errors import UserError
from ast_sparse.training.loader import (
    DATA_STATE,
    BlockBatches,
    block_loader,
    load_data_state,
    make_mixture,
    save_data_state,
)

PARTS: dict[str, Any] = {
    name: [{"input_ids": [100 * number + place]} for place in range(count)]
    for number, (name, count) in enumerate({"cc": 21, "wiki": 5}.items())
}


UPDATE = MixtureConfig(shares={"cc": 0.6, "wiki": 0.4}, targets={"cc": 1.0, "wiki": 2.0}, type="doremi")


@dataclass
class Arguments:
    """The TrainingArguments that the loader reads."""

    train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    world_size: int = 1
    process_index: int = 0
    seed: int = 7
    data_seed: int | None = None
    dataloader_pin_memory: bool = False
    dataloader_num_workers: int = 0
    train_sampling_strategy: str = "random"
    ignore_data_skip: bool = False


def arguments(**values: Any) -> Any:
    return Arguments(**values)


def mixture(args: Any) -> Mixture:
    return make_mixture(PARTS, {"wiki": 0.4, "cc": 0.6}, args)


def batches(args: Any, epochs: int = 1) -> list[list[int]]:
    sampler = BlockBatches(mixture(args), DomainBlocks(PARTS).offsets, args)
    found: list[list[int]] = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        passed = list(sampler)
        assert len(passed) == len(sampler)
        found += passed
    return found


def steps_of(args: Callable[[int], Any], ranks: int, accumulation: int) -> list[list[int]]:
    """The indices of each step in the order of micro-batch and rank."""
    by_rank = [batches(args(rank), epochs=2) for rank in range(ranks)]
    micros = [[index for rank in by_rank for index in rank[micro]] for micro in range(len(by_rank[0]))]
    return [
        [index for micro in micros[first : first + accumulation] for index in micro]
        for first in range(0, len(micros), accumulation)
    ]


@pytest.mark.parametrize(("ranks", "accumulation", "size"), [(1, 1, 8), (1, 4, 2), (2, 1, 4), (2, 2, 2), (4, 2, 1)])
def test_ranks_and_micro_batches_share_the_same_samples_of_every_step(ranks: int, accumulation: int, size: int) -> None:
    def args(rank: int) -> Any:
        return arguments(
            train_batch_size=size, gradient_accumulation_steps=accumulation, world_size=ranks, process_index=rank
        )

    found = steps_of(args, ranks, accumulation)
    ours = mixture(args(0))
    assert len(found) == 2 * -(-26 // 8)
    for step, indices in enumerate(found):
        domains, blocks = ours.samples(step)
        assert indices == (DomainBlocks(PARTS).offsets[domains] + blocks).tolist()


def test_nothing_comes_twice_before_its_domain_is_used_up() -> None:
    args = arguments(train_batch_size=8)
    plain = make_mixture({"train": PARTS["cc"]}, None, args)
    sampler = BlockBatches(plain, np.zeros(1, dtype=np.int64), args)
    found = [index for epoch in range(2) for batch in (sampler.set_epoch(epoch), list(sampler))[1] for index in batch]
    assert sorted(found[:21]) == list(range(21)) == sorted(found[21:42])
    assert found[:21] != found[21:42]


def test_resume_begins_at_the_next_block() -> None:
    args = arguments()
    whole = [row.tolist() for row in block_loader(DomainBlocks(PARTS), mixture(args), collated, args)]
    for done in (1, 5, len(whole) - 1):
        loader = skip_first_batches(block_loader(DomainBlocks(PARTS), mixture(args), collated, args), done)
        assert [row.tolist() for row in loader] == whole[done:]
        sampler = loader.batch_sampler.batch_sampler  # where Trainer looks for the sampler
        sampler.set_epoch(1)
        assert [row.tolist() for row in loader] != whole[done:]


def test_loader_fetches_a_batch_when_it_is_needed_with_any_number_of_workers() -> None:
    args = arguments(dataloader_num_workers=4)
    ours, asked = mixture(args), []
    samples = ours.samples
    ours.samples = lambda step: asked.append(step) or samples(step)  # type: ignore[method-assign,func-returns-value]
    iterator = iter(block_loader(DomainBlocks(PARTS), ours, collated, args))
    for step in range(3):
        next(iterator)
        assert asked == list(range(step + 1))
    ours.change_shares(3, [0.0, 1.0], [1.0, 1.0])
    assert all(token >= 100 for token in next(iterator).tolist())


def collated(rows: list[dict[str, Any]]) -> Any:
    return np.asarray([row["input_ids"][0] for row in rows])


def test_order_follows_the_seed_of_the_data_or_else_of_the_run() -> None:
    assert batches(arguments(seed=1)) == batches(arguments(seed=2, data_seed=1)) != batches(arguments(seed=2))


def test_shares_default_to_the_sizes_of_the_domains() -> None:
    assert make_mixture(PARTS, None, arguments()).shares_at(0) == (21 / 26, 5 / 26)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_sampling_strategy": "sequential"}, r"training\.train_sampling_strategy='sequential': blocks have"),
        ({"ignore_data_skip": True}, r"training\.ignore_data_skip=True: blocks that were used"),
    ],
)
def test_setting_that_asks_for_another_order_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixture(arguments(**values))


def test_state_restores_the_history_of_the_shares(tmp_path: Path) -> None:
    args = arguments()
    ours, theirs = mixture(args), mixture(args)
    ours.change_shares(4, [0.1, 0.9], [2.0, 3.0])
    save_data_state(tmp_path, ours, UPDATE, PARTS)
    load_data_state(tmp_path, theirs, UPDATE, PARTS)
    assert theirs.history == ours.history and theirs.used(9).tolist() == ours.used(9).tolist()


def edited(**values: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(seed=3), r"training\.data_seed, or training\.seed, \(7 instead of 3\) differs from"),
        (edited(batch=4), r"The sequences of a step, .* \(2 instead of 4\) differs from .*repeated or left out"),
        (edited(domains={"wiki": 5, "cc": 21}), r"The number of training blocks differs"),
        (edited(fingerprints={"cc": "x", "wiki": ""}), r"The training text differs"),
        (
            edited(update={**UPDATE.to_dict(), "rate": 2.0}),
            r"A share or target of data\.domains, or data\.update,",
        ),
        (edited(history=[]), r"data_state\.json is damaged"),
        (edited(format_version=2), r"data_state\.json is damaged"),
        (lambda path: path.write_text("{"), r"data_state\.json"),
        (Path.unlink, r"has no data_state\.json: its run read other data"),
    ],
)
def test_state_of_another_run_or_damaged_is_refused(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    ours = mixture(arguments())
    save_data_state(tmp_path, ours, UPDATE, PARTS)
    damage(tmp_path / DATA_STATE)
    with pytest.raises(UserError, match=message):
        load_data_state(tmp_path, mixture(arguments()), UPDATE, PARTS)
