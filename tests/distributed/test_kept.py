"""Two ranks keep N:M as one process does, under DDP and under FSDP2."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.kept_facts import by_hand, by_trainer, plain
from tests.processes import run_command


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("kept")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = run_command([sys.executable, *launch, "-m", "tests.distributed.kept_facts", str(out)])
    assert finished.returncode == 0, finished.stderr[-5000:]
    return torch.load(out / "facts.pt", weights_only=True)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    start, moved = plain().state_dict(), 0
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-8), name
        if ".layers." in name and found[name].dim() == 2:
            assert torch.equal(found[name] == 0, start[name] == 0)
            moved += not torch.equal(found[name], start[name])
    assert moved == 14


def test_ddp(facts: dict[str, Any], tmp_path: Path) -> None:
    same(facts["ddp"], by_trainer(tmp_path, 1).state_dict())


def test_fsdp2_works_on_the_pieces(facts: dict[str, Any]) -> None:
    model = plain()
    by_hand(model, 0, 1)
    same(facts["fsdp"], dict(model.named_parameters()))


def test_an_unstructured_share_is_of_the_whole_weight(facts: dict[str, Any]) -> None:
    assert facts["unstructured"] == 14


def test_a_sharded_weight_is_judged_as_a_whole(facts: dict[str, Any]) -> None:
    assert facts["pieces"] == {"check_nm": False, "quarter": False, "flip_rate": 0.5}


def test_what_needs_whole_weights_refuses_a_sharded_model(facts: dict[str, Any]) -> None:
    said = "The model is sharded: each process has only its piece of a weight. "
    assert facts["refusals"] == [
        said + "Prune it before it is sharded, as SparseTrainer does.",
        said + "Change its basis before it is sharded.",
        said + "Save it whole with trainer.save_model(FOLDER), and export that folder.",
        said + "Merge before it is sharded, or merge the folder of a saved adapter.",
    ]


def test_fsdp2_of_a_conv1d_is_refused(facts: dict[str, Any]) -> None:
    assert facts["refusal"] == (
        "FSDP2 cuts the groups of a Conv1D. Train this model with DDP (torchrun), without FSDP."
    )
