"""A model in the hub's cache, as if it had been downloaded."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest

COMMIT = "0123456789" * 4
OLDER = "9876543210" * 4


def put_on_hub(folder: Path, cache: Path, patch: pytest.MonkeyPatch, older: Path | None = None) -> str:
    """Make a copy of a folder the newest commit of a repository in an empty cache of the hub; returns its id.

    Args:
        older: a folder that becomes the commit OLDER of the repository.
    """
    repository = cache / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    if older is not None:
        shutil.copytree(older, repository / "snapshots" / OLDER)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return "org/tiny"
