"""Two ranks agree on which steps have no counted token, and hold the same weights and masks, or stop."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.empty_facts import SETTINGS, run
from tests.distributed.replica_facts import FAULTY
from tests.processes import run_command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Facts by rank, and what the ranks wrote to stderr."""
    out = tmp_path_factory.mktemp("two")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, "-m", "tests.distributed.empty_facts", str(out)]
    finished = run_command(command)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return json.loads((out / "facts.json").read_text()), finished.stderr


def test_a_step_is_empty_only_if_no_rank_has_a_counted_token(
    finished: tuple[list[dict[str, Any]], str], tmp_path: Path
) -> None:
    facts, stderr = finished
    alone = run(tmp_path / "alone", 1)
    assert facts[0] == facts[1]
    for name in SETTINGS:
        sums = facts[0][name]["sums"]
        assert [one != two for one, two in pairwise(sums)] == [True, False, True, False], name
        assert [one[1] != two[1] for one, two in pairwise(sums)] == [True, False, True, False], name
    for name in ("ddp", "fsdp"):
        assert facts[0][name]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert len(alone["losses"]) == 3
    assert stderr.count("has no token that the loss counts") == len(SETTINGS)


def test_ddp_keeps_gradients_in_its_buckets_and_searches_for_no_unused_parameters(
    finished: tuple[list[dict[str, Any]], str],
) -> None:
    for name in ("ddp", "accumulated", "evaluated first"):
        found = finished[0][0]["copies"][name]
        is_view, memories, tensors = found["views"]
        assert is_view and memories < tensors / 5, found
        assert not found["searches"]


def test_under_ddp_an_evaluation_before_training_changes_nothing(finished: tuple[list[dict[str, Any]], str]) -> None:
    weights = [rank["copies"][name]["weights"] for rank in finished[0] for name in ("ddp", "evaluated first")]
    assert len(weights) == 4 and len(set(weights)) == 1


def test_held_out_rows_of_a_stream_count_once(finished: tuple[list[dict[str, Any]], str]) -> None:
    for rank in finished[0]:
        found = dict(rank["copies"]["streamed"])
        refused = found.pop("refused")
        assert len(refused) == 2 and all("an eval_dataset without a length would count" in each for each in refused)
        assert len(found) == 4
        for count, (stream, rows) in found.items():
            assert stream == pytest.approx(rows, rel=1e-6), count


def test_ranks_whose_masks_differ_after_a_refresh_stop_and_name_layer_and_step(
    finished: tuple[list[dict[str, Any]], str],
) -> None:
    for rank in finished[0]:
        said = rank["copies"]["stopped"]
        assert said.startswith(f"after step 4: Step 4: the mask of `{FAULTY}` is not the same on all processes")
        assert "Resume from the last checkpoint" in said


def test_replicas_refresh_to_equal_masks_each_counted_once_and_compare_them(
    finished: tuple[list[dict[str, Any]], str],
) -> None:
    for rank in finished[0]:
        found = rank["copies"]["replicas"]
        assert found["replicas"] == found["plain"]
        assert max(now for now, _ in found["plain"].values()) > 0
        assert found["stopped"].startswith(f"Step 7: the mask of `{FAULTY}` is not the same")


def test_a_save_that_one_rank_cannot_write_ends_all_ranks(finished: tuple[list[dict[str, Any]], str]) -> None:
    for rank in finished[0]:
        assert len(rank["full"]) == 5
        for name, (message, left) in rank["full"].items():
            assert "checkpoint-2`: [Errno 28] No space left on device. There is no checkpoint yet" in message, name
            assert left == []
        for name, said in rank["full at the end"].items():
            (message,) = said
            assert "/end`: [Errno 28] No space left on device. There is no checkpoint yet" in message, name
