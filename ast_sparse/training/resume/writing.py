"""Errors while a run is written: one line each, and all processes end with it."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from ast_sparse.distributed.ranks import errors_shared, wait_for_all
from ast_sparse.errors import SharedError, UserError, one_line
from ast_sparse.training.resume.checkpoints import last_checkpoint

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
_TORCH_WRITE = re.compile(r"PytorchStreamWriter|inline_container|file write failed")


@contextmanager
def write_errors(run: Path, folder: Path | None = None) -> Iterator[None]:
    """One line instead of what torch, safetensors and Python say if a folder cannot be written.

    Args:
        run: the output folder of the run.
        folder: what is written; default: the run.

    Raises:
        UserError: it names the last good checkpoint; a SharedError if torch has told all processes.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = one_line(cause, end="open")
        if isinstance(error, OSError) and error.errno not in _NOT_WRITABLE:
            raise
        if isinstance(error, RuntimeError):
            if not _TORCH_WRITE.search(reason):
                raise
            reason = "a file could not be written whole"  # torch only says where in its own code
        last = last_checkpoint(run, is_read=False, but=folder)
        good = f"Last good checkpoint: {last}" if last else "There is no checkpoint yet"
        made = SharedError if isinstance(error, CheckpointException) else UserError
        raise made(f"Cannot write `{folder or run}`: {reason}. {good}. Make room, then use --resume.") from error


@contextmanager
def checkpoint_written(folder: Path, removes: bool) -> Iterator[None]:
    """Write a checkpoint into an empty folder; if one process cannot, the folder is removed, and all have its error.

    All processes must enter the block. After writing, they must `wait_for_all` in it before they meet on the devices.

    Args:
        folder: in the output folder of the run.
        removes: whether this process removes it.

    Raises:
        SharedError: a process cannot write.
    """
    try:
        with errors_shared(), write_errors(folder.parent, folder):
            if removes and folder.is_dir():  # left by an interrupted save, maybe with more processes
                shutil.rmtree(folder)
            wait_for_all()
            yield
    except BaseException as error:
        if removes:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, SharedError):  # raised on every process; none may end before the folder is removed
            wait_for_all()
        raise
