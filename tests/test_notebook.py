from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.models import save_tiny_model

NOTEBOOK = Path(__file__).parents[1] / "scripts" / "notebooks" / "quickstart.ipynb"


def test_quickstart_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AST_SPARSE_MODEL", str(save_tiny_model(tmp_path / "model")))
    monkeypatch.setenv("AST_SPARSE_OUTPUT", str(tmp_path / "out"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert (tmp_path / "out" / "compressed" / "config.json").is_file()
