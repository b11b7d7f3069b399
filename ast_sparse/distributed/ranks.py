"""What the processes of a distributed run agree on."""

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ast_sparse.distributed.meeting import launched
from ast_sparse.errors import DivergenceError, LostProcessError, SharedError, UserError

Result = TypeVar("Result")
# what gloo and NCCL say of a process that has ended
_LOST = re.compile(r"connection (closed|reset) by|broken pipe|remote process (has )?exited|was aborted", re.IGNORECASE)


def rank() -> int:
    """The rank of this process; 0 if there is no other."""
    if (meeting := launched()) is not None:
        return meeting.rank
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def own_rank() -> tuple[int, int]:
    """This process's rank, and the number of processes; (0, 1) outside a distributed run."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean over the processes, the same on each; with one process, the values themselves.

    Args:
        values: floating point, on the device of training; NaN or infinity on one rank is returned on all.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any process; a single process does not wait for its device to know."""
    if own_rank()[1] == 1:
        return flag
    return bool(mean_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def gather(value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks, on every process; for small values and long waits.

    It is also what the processes of a launcher agree by before there is a process group.

    Raises:
        SharedError: the UserError of a process whose block of `errors_shared` has ended with it.
    """
    if (meeting := launched()) is not None:
        values = meeting.gather(value)
    elif dist.is_available() and dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    else:
        values = [value]
    if (failure := next((each for each in values if isinstance(each, _Failure)), None)) is not None:
        raise SharedError(str(failure))
    return values


class _Failure(str):
    """The text of a UserError, which a process sends instead of a value."""


@contextmanager
def errors_shared() -> Iterator[None]:
    """Raise the first UserError that a process raises in the block on all processes; all must enter the block.

    Blocks may be nested, and the block may `gather` and `wait_for_all`. It may meet the others on the devices only if
    one of these follows all that may have failed on one process alone.

    Raises:
        SharedError: that error.
        DivergenceError: as in the block, where all processes must raise it.
    """
    try:
        yield
    except (SharedError, DivergenceError):  # all have it
        raise
    except UserError as error:
        gather(_Failure(error))
    else:
        gather(None)


@contextmanager
def lost_processes() -> Iterator[None]:
    """One line instead of what torch says on each process if one of them is killed.

    Raises:
        LostProcessError: a process has ended while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        if own_rank()[1] == 1 or not _LOST.search(str(error)):
            raise
        raise LostProcessError(
            "Another process has ended, so this one cannot go on. Its messages, or those of the launcher, say why; the "
            "run continues from its last checkpoint when it is started again."
        ) from error


def wait_for_all() -> None:
    """Wait until every process has called this."""
    gather(None)


def once_per_folder(folder: Path, work: Callable[[], Result]) -> Result:
    """Do work that fills a cache: first in one process for each folder, then in the others, which find the cache full.

    Nodes with a shared folder have one process that fills it; each node with a folder of its own has one too. Every
    process must call this.

    Args:
        folder: the cache; a process that cannot write there does its work at once.

    Raises:
        SharedError: the UserError of a process, on all.
    """
    names = gather(f".{uuid.uuid4().hex}")  # new ones, so that no node has cached that they are missing
    if len(names) == 1:
        return work()
    mine, result = folder / names[rank()], None
    try:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()
        wait_for_all()
        seen = next((name for name in names if (folder / name).exists()), mine.name)
        is_first = seen == mine.name or not mine.exists()
        wait_for_all()
    finally:
        with suppress(OSError):
            mine.unlink(missing_ok=True)
    with errors_shared():
        if is_first:
            result = work()
    with errors_shared():
        if not is_first:
            result = work()
    return result  # type: ignore[return-value]  # one of the two blocks set it
