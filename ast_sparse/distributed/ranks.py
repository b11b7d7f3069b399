"""What the processes of a distributed run agree on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ast_sparse.errors import SharedError, UserError


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
    """Whether `flag` is set on any process."""
    return bool(mean_over_ranks(torch.tensor(float(flag), device=device)) > 0)


def gather(value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks, on every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def errors_shared() -> Iterator[None]:
    """Raise the first UserError that a process raises in the block on all processes; all must enter the block.

    Raises:
        SharedError: that error.
    """
    error = None
    try:
        yield
    except UserError as found:
        error = str(found)
    first = next((text for text in gather(error) if text is not None), None)
    if first is not None:
        raise SharedError(first)


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
