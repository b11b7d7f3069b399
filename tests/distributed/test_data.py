"""Blocks of shards, mixtures and streams go to the ranks in one order, each once, also after a resume."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.data_facts import BATCH, RANKS, SAVED, SOURCES, STEPS, Blocks, run, write_text
from tests.processes import run_command

KINDS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tmp_path_factory.mktemp("data")
    write_text(text)
    return text


@pytest.fixture(scope="module")
def facts(text: Path) -> list[dict[str, Any]]:
    """By rank."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    command = [sys.executable, *launch, "-m", "tests.distributed.data_facts", str(text)]
    finished = run_command(command)
    assert finished.returncode == 0, finished.stderr[-5000:]
    found: list[dict[str, Any]] = json.loads((text / "facts.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(text: Path) -> dict[str, Blocks]:
    """What a single process trains on."""
    return {name: run(text, name, "none", 1).seen for name in SOURCES}


def joined(parts: list[Blocks]) -> Blocks:
    """The blocks of each step of all ranks: those of the first micro-batch rank by rank, then those of the second."""
    steps = []
    for rows in zip(*parts, strict=True):
        half = len(rows[0]) // 2
        steps.append([row for part in (slice(half), slice(half, None)) for rank in rows for row in rank[part]])
    return steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOURCES)
def test_ranks_divide_the_blocks_of_one_process(
    facts: list[dict[str, Any]], alone: dict[str, Blocks], name: str, kind: str
) -> None:
    parts = [rank[f"{name}, {kind}"] for rank in facts]
    assert all(len(rows) == BATCH // RANKS for part in parts for rows in part)
    assert joined(parts) == alone[name]


@pytest.mark.parametrize("name", SOURCES)
def test_no_block_comes_twice(alone: dict[str, Blocks], name: str) -> None:
    blocks = [tuple(block) for rows in alone[name] for block in rows]
    assert len(blocks) == STEPS * BATCH == len(set(blocks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOURCES)
def test_resumed_ranks_continue_at_the_next_block(facts: list[dict[str, Any]], name: str, kind: str) -> None:
    for rank in facts:
        whole, resumed = rank[f"{name}, {kind}"], rank[f"{name}, {kind}, resumed"]
        assert resumed[:SAVED] == [[]] * SAVED and resumed[SAVED:] == whole[SAVED:]


@pytest.mark.parametrize("name", SOURCES)
def test_workers_change_nothing(facts: list[dict[str, Any]], name: str) -> None:
    for rank in facts:
        assert rank[f"{name}, workers"] == rank[f"{name}, ddp"][:2]


@pytest.mark.parametrize("name", SOURCES)
def test_one_process_continues_where_two_ranks_stopped(
    text: Path, facts: list[dict[str, Any]], alone: dict[str, Blocks], name: str
) -> None:
    resumed = run(text, name, "none", 1, text / f"{name}-ddp-{RANKS}" / f"checkpoint-{SAVED}").seen
    assert resumed[SAVED:] == alone[name][SAVED:]


def test_text_is_tokenised_once_for_each_cache(facts: list[dict[str, Any]]) -> None:
    shared = [rank["made in one cache"] for rank in facts]
    assert min(shared) == 0 < max(shared)
    assert [rank["made in its cache"] for rank in facts] == [max(shared)] * RANKS


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("options, on all", "--resume and --overwrite cannot be combined"),
        ("configuration, on one", "absent.yaml"),
        ("argument, on all", "max_stepz"),
        ("text, on one", "absent.jsonl"),
        ("other setting", "training.learning_rate=0.002 on process 1 differs from 0.001"),
        ("other model", "model.name_or_path: the model on process 1 differs from that on process 0"),
        ("other model, --find-lr", "model.name_or_path: the model on process 1 differs from that on process 0"),
        ("other evaluation", "evaluation.datasets: the text on process 1 differs from that on process 0"),
        ("other text", "data.train: the text on process 1 differs from that on process 0"),
        ("other folder", "/refused 0' of process 0, so parts of each checkpoint would lie elsewhere"),
    ],
)
def test_an_error_is_said_by_one_process_and_ends_all_with_2(
    facts: list[dict[str, Any]], text: Path, case: str, message: str
) -> None:
    codes, said = zip(*(rank["errors"][case] for rank in facts), strict=True)
    assert codes == (2,) * RANKS
    lines = "".join(said).splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and message in lines[0]
    assert not list(text.glob("refused*"))
