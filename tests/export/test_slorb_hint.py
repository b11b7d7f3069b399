"""How vLLM serves SLoRB, as ast-export says it."""

from pathlib import Path

import pytest
import torch

from ast_sparse.export.slorb_hint import serving_hint
from ast_sparse.storage.slorb_adapter import write_adapter


def adapter(folder: Path, rank: int, group_dim: int = 1) -> Path:
    write_adapter(folder / "slorb", str(folder), {"a": (torch.zeros(8, rank), torch.zeros(rank, 2 * rank))}, group_dim)
    return folder / "slorb"


@pytest.mark.parametrize("rank, allowed", [(1, 1), (2, 8), (36, 64), (256, 256), (257, 320), (512, 512)])
def test_the_smallest_rank_of_vllm_that_is_enough_is_named(rank: int, allowed: int, tmp_path: Path) -> None:
    folder = adapter(tmp_path, rank)
    for compressed in (True, False):
        assert serving_hint(tmp_path, compressed) == (
            f"SLoRB has rank {rank}; in vLLM: --enable-lora --max-lora-rank {allowed} --lora-modules slorb={folder}"
        )


def test_a_rank_that_vllm_does_not_allow_is_served_in_the_layers_of_a_compressed_export(tmp_path: Path) -> None:
    adapter(tmp_path, 688)  # LLaMA2-7B's down_proj with k = 16: 11008 / 16
    start = "SLoRB has rank 688, more than the 512 of vLLM's LoRA; "
    assert serving_hint(tmp_path, True) == start + "in vLLM: --hf-overrides '{\"ast_sparse_slorb\": true}'"
    assert serving_hint(tmp_path, False) == start + "export with --format compressed to serve it."


def test_an_export_without_slorb_or_with_one_for_conv1d_has_no_hint(tmp_path: Path) -> None:
    assert serving_hint(tmp_path, True) is None
    adapter(tmp_path, 4, group_dim=0)
    assert serving_hint(tmp_path, True) is serving_hint(tmp_path, False) is None
