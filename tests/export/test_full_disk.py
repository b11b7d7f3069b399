"""Exports to a disk without room: refused before the work, or one line in its course."""

import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from tests.export.sparse_models import sparse_model


@pytest.mark.parametrize("format", ["dense", "compressed", "compressed-int4"])
def test_a_disk_without_room_is_refused_before_anything_is_written(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse_model()
    export_model(model, tmp_path / "out", format)
    needed = sum(value.nbytes for value in load_file(tmp_path / "out" / "model.safetensors").values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=r"new` has 0\.0 GiB free, and the model needs about 0\.0 GiB\. Make room"):
        export_model(model, tmp_path / "new", format)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    export_model(model, tmp_path / "new", format)


@pytest.mark.parametrize("format", ["dense", "compressed"])
def test_a_file_that_cannot_be_written_is_an_error_of_the_user(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, limits = sparse_model(), resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would leave cut files of the modules it imports
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes of a file: in effect a full disk
    try:
        with pytest.raises(UserError, match=r"Cannot write .*out`: .*File too large.*Check the space"):
            export_model(model, tmp_path / "out", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
