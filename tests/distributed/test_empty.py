"""Ranks agree on which steps have no counted token: if one rank has some, they train; if none has, nothing changes."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.empty_facts import SETTINGS, run
from tests.processes import run_command


def test_a_step_is_empty_only_if_no_rank_has_a_counted_token(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, "-m", "tests.distributed.empty_facts", str(tmp_path)]
    finished = run_command(command)
    assert finished.returncode == 0, finished.stderr[-5000:]
    facts: list[dict[str, Any]] = json.loads((tmp_path / "facts.json").read_text())
    alone = run(tmp_path / "alone", 1)
    assert facts[0] == facts[1]
    for name in SETTINGS:
        sums = facts[0][name]["sums"]
        assert [one != two for one, two in pairwise(sums)] == [True, False, True, False], name
        assert [one[1] != two[1] for one, two in pairwise(sums)] == [True, False, True, False], name
    for name in ("ddp", "fsdp"):
        assert facts[0][name]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert len(alone["losses"]) == 3
    assert finished.stderr.count("has no token that the loss counts") == len(SETTINGS)
