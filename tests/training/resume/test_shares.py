"""Several processes divide the reading of a checkpoint, and all of them name the file that one finds damaged."""

import os
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed as dist

from ast_sparse.distributed import ranks as ranks_module
from ast_sparse.distributed.meeting import Meeting
from ast_sparse.errors import UserError
from ast_sparse.run.output import checkpoint_to_resume
from ast_sparse.storage import checksums
from ast_sparse.storage.checksums import write_checksums
from ast_sparse.training.resume import checkpoints as checkpoints_module
from ast_sparse.training.resume.checkpoints import (
    checkpoint_to_continue,
    faults,
    faults_and_stretches,
    resolve_checkpoint,
)

RANKS, TENSORS, SIDE = 3, 6, 600  # tensors of more than a MiB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    tensors = {f"layer.{number}.weight": torch.randn(SIDE, SIDE) for number in range(TENSORS)}
    save_file(tensors, folder / "model.safetensors")
    write_checksums(folder)
    state = {number: {"momentum": tensor + 1} for number, tensor in enumerate(tensors.values())}
    torch.save({"state": state, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": 1}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    for name in ("sparsity_config.json", "trainer_state.json"):
        (folder / name).write_text("{}")
    return folder


def in_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path | None], Counter[int]]:
    """What each of three processes, here threads, continues from, and how many bytes it read for the checksums."""
    store, local, read = dist.HashStore(), threading.local(), Counter[int]()
    compared = checksums.stretch_faults

    def counted(folder: Path, stretches: list[checksums.Stretch]) -> list[str]:
        read[local.meeting.rank] += sum(each.size for each in stretches)
        return compared(folder, stretches)

    def work(rank: int) -> Path | None:
        local.meeting = Meeting(store, rank, RANKS)
        return checkpoint_to_continue(folder.parent)

    with monkeypatch.context() as patch, ThreadPoolExecutor(RANKS) as pool:
        patch.setattr(ranks_module, "launched", lambda: local.meeting)
        patch.setattr(checkpoints_module, "stretch_faults", counted)
        return list(pool.map(work, range(RANKS))), read


def test_each_process_reads_its_share(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(each.size for each in faults_and_stretches(folder)[1])
    assert whole >= 2 * TENSORS * SIDE * SIDE * 4
    found, read = in_processes(folder, monkeypatch)
    assert found == [folder] * RANKS
    assert all(read[rank] == pytest.approx(whole / RANKS, rel=0.05) for rank in range(RANKS))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_byte_is_found_by_all_wherever_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    path = folder / file
    for part in (0.1, 0.45, 0.9):  # inside tensors
        content = bytearray(path.read_bytes())
        content[int(part * len(content))] ^= 1
        path.write_bytes(content)
        assert in_processes(folder, monkeypatch)[0] == [None] * RANKS
        assert any(file in fault for fault in faults(folder))
        content[int(part * len(content))] ^= 1
        path.write_bytes(content)
    assert in_processes(folder, monkeypatch)[0] == [folder] * RANKS


def test_a_cut_or_missing_file_is_found_by_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(folder / "optimizer.pt", 3_000_000)
    assert in_processes(folder, monkeypatch)[0] == [None] * RANKS
    (folder / "optimizer.pt").unlink()
    assert in_processes(folder, monkeypatch)[0] == [None] * RANKS
    assert faults(folder) == ["optimizer.pt is missing"]


def test_the_first_process_decides_where_others_see_an_older_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = shutil.copytree(folder, folder.with_name("checkpoint-3"))
    seen = {0: [folder, older], 1: [older], 2: []}
    store, local = dist.HashStore(), threading.local()
    monkeypatch.setattr(ranks_module, "launched", lambda: local.meeting)
    monkeypatch.setattr(checkpoints_module, "checkpoint_folders", lambda output: seen[local.meeting.rank])

    def work(rank: int) -> list[Path | None]:
        local.meeting = Meeting(store, rank, RANKS, longest_s=20)
        return [checkpoint_to_resume(folder.parent, True), resolve_checkpoint(folder.parent, True)]

    with ThreadPoolExecutor(RANKS) as pool:
        assert list(pool.map(work, range(RANKS))) == [[folder, folder]] * RANKS  # of ast-train, of SparseTrainer
        seen[0] = []  # nothing to resume, so an older checkpoint that others still see is not used either
        for each in [pool.submit(work, rank) for rank in range(RANKS)]:
            with pytest.raises(UserError, match="Nothing to resume"):
                each.result()
