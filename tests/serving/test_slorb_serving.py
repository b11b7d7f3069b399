"""SLoRB inside the layers: which adapter, and what each rank gets of it."""

from pathlib import Path

import pytest
import torch

from ast_sparse.errors import UserError
from ast_sparse.serving.slorb_serving import SlorbFiles, adapter_folder, input_slice
from ast_sparse.storage.slorb_adapter import write_adapter


def adapter(folder: Path, rank: int, name: str = "model.layers.0.mlp.down_proj") -> Path:
    pairs = {name: (torch.randn(8, rank), torch.randn(rank, 2 * rank))}
    write_adapter(folder / "slorb", str(folder), pairs)
    return folder / "slorb"


def test_the_setting_names_a_folder_or_means_the_one_beside_the_model(tmp_path: Path) -> None:
    folder = adapter(tmp_path, 4)
    assert adapter_folder(True, str(tmp_path)) == folder
    assert adapter_folder(str(folder), "elsewhere") == folder
    assert adapter_folder(None, str(tmp_path)) is adapter_folder(False, str(tmp_path)) is None
    with pytest.raises(UserError, match="ast_sparse_slorb=1 must be true, or the folder of a SLoRB adapter"):
        adapter_folder(1, str(tmp_path))
    with pytest.raises(UserError, match=r"^ast_sparse_slorb=True: `.*slorb` holds no SLoRB adapter"):
        adapter_folder(True, str(tmp_path / "other"))


def test_a_pair_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    s, x = torch.randn(8, 4), torch.randn(4, 16)
    write_adapter(tmp_path / "slorb", "base", {"a": (s, x), "b": (s[:, :2] + 1, x[:2])})
    found = SlorbFiles(tmp_path / "slorb", {"a", "b"})
    assert found.ranks == {"a": 4, "b": 2}
    assert torch.equal(found.pair("a")[0], s) and torch.equal(found.pair("b")[1], x[:2])


def test_slorb_of_a_dense_layer_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path, 4)
    with pytest.raises(UserError, match=r"has SLoRB for `model.layers.0.mlp.down_proj`, which is not compressed"):
        SlorbFiles(folder, {"model.layers.0.mlp.up_proj"})


def test_ranks_that_split_the_inputs_split_x() -> None:
    x = torch.arange(24.0).view(2, 12)
    assert torch.equal(torch.cat([input_slice(x, 4, rank) for rank in range(3)], 1), x)
    assert input_slice(x, 12, 2) is x
