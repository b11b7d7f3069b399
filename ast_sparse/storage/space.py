"""Whether a disk has room for a model, asked before the work that would be lost."""

import shutil
from pathlib import Path

from ast_sparse.errors import UserError

GIB = 2**30


def free_bytes(folder: Path) -> int:
    """Bytes that are free where this folder is, or will be."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(there).free


def check_space(out_dir: Path, needed: int) -> None:
    """Raise UserError if a folder has no room for a model of so many bytes.

    A model that it holds does not count as room: it is replaced once the new one is complete.
    """
    free = free_bytes(out_dir)
    if free < needed:
        raise UserError(
            f"`{out_dir}` has {free / GIB:.1f} GiB free, and the model needs about {needed / GIB:.1f} GiB. Make room, "
            "or choose another output folder."
        )
