"""Waits and small values of all processes by the launcher's key-value store, apart from what the devices send.

A wait on the devices' communicator would count against its timeout (`training.ddp_timeout`), and Python would handle no
signal during it. Here one process may work for hours while the others wait, and a signal still ends each of them. The
store also works before there is a process group: when settings are read.
"""

import os
import pickle
import time
from datetime import timedelta
from typing import Any

from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from ast_sparse.errors import SharedError

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what `env://` needs
_JOIN = timedelta(minutes=30)  # for all processes to start
_JOIN_AT_THE_END = timedelta(seconds=20)  # the same, for a process that will exit
_joined: dict[tuple[str, ...], "Meeting"] = {}  # by what the launcher has set
_LONGEST_S = 86_400.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.25


class Meeting:
    """The processes that a launcher has started.

    Args:
        store: the same for all of them; the process of rank 0 may be its server.
        longest_s: seconds that a process waits for the others.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, longest_s: float = _LONGEST_S) -> None:
        self.rank, self.ranks = rank, ranks
        self._store = store
        self._longest_s = longest_s
        self._round = 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in the order of their ranks, on every process; every process must call this.

        Raises:
            SharedError: the store is gone, with the process that served it.
            TimeoutError: a process did not come.
        """
        self._round += 1
        place = f"round {self._round}"
        keys = [f"{place}, rank {rank}" for rank in range(self.ranks)]
        try:
            self._store.set(keys[self.rank], pickle.dumps(value))  # type: ignore[arg-type]  # bytes are a C++ string
            self._count(f"{place}, come")
            values = [pickle.loads(each) for each in self._store.multi_get(keys)]
            self._count(f"{place}, read", waits=self.rank == 0)  # the server must not end before all have read
            if self.rank == 0:
                for key in [*keys, *(f"{place}, {done}{end}" for done in ("come", "read") for end in ("", ", all"))]:
                    self._store.delete_key(key)
        except dist.DistError as error:
            raise SharedError("The process of rank 0 has ended. Its messages say why.") from error
        return values

    def is_first_to(self, what: str) -> bool:
        """Whether no other process has asked this about `what`; True if the store is gone."""
        try:
            return self._store.add(f"first to {what}", 1) == 1
        except dist.DistError:
            return True

    def _count(self, key: str, waits: bool = True) -> None:
        """Count this process under a key, and wait until all are counted."""
        all_counted = f"{key}, all"
        if self._store.add(key, 1) == self.ranks:
            self._store.set(all_counted, "1")
        until, pause = time.monotonic() + self._longest_s, _FIRST_PAUSE_S
        while waits and not self._store.check([all_counted]):
            if time.monotonic() > until:
                raise TimeoutError(f"The other processes did not come within {self._longest_s:g} s ({key}).")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)


def launched(join: timedelta = _JOIN) -> Meeting | None:
    """The processes of this launch, once all of them have called this; None if a launcher has started only one.

    Raises:
        SharedError: as `check_restarted`.
        DistError: not all of them called this within `join`.
    """
    given = tuple(os.environ.get(name, "") for name in _LAUNCHER)
    if not dist.is_available() or not all(given) or int(given[1]) < 2:
        return None
    check_restarted()
    if given not in _joined:
        store, rank, ranks = next(iter(rendezvous("env://", timeout=join)))
        _joined.clear()
        _joined[given] = Meeting(dist.PrefixStore("ast_sparse", store), rank, ranks)
    return _joined[given]


def is_first_of_launch_to(what: str) -> bool | None:
    """As `Meeting.is_first_to`, for a process that will exit; None if there are no others, or they do not answer."""
    try:
        meeting = launched(_JOIN_AT_THE_END)
    except (SharedError, dist.DistError):
        return None
    return None if meeting is None else meeting.is_first_to(what)


def check_restarted() -> None:
    """Check that the processes do not meet in the store of processes that have ended.

    Raises:
        SharedError: torchrun has restarted this process with that store.
    """
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_shared and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise SharedError(
            "torchrun restarted the processes with the addresses of those that ended, so they cannot connect. Set the "
            "environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and give torchrun --rdzv-backend c10d."
        )
