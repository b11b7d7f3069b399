"""Processes meet in a store: values in order, one speaker, and waits that a signal ends."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import distributed as dist

from ast_sparse.distributed import ranks as ranks_module
from ast_sparse.distributed.meeting import Meeting
from ast_sparse.distributed.ranks import errors_shared, gather, lost_processes, wait_for_all
from ast_sparse.errors import LostProcessError, SharedError, UserError

RANKS = 3


def test_values_come_in_the_order_of_ranks_and_leave_no_keys() -> None:
    store = dist.HashStore()

    def meet(rank: int) -> list[Any]:
        meeting = Meeting(store, rank, RANKS)
        found = []
        for number in range(5):
            time.sleep(0.01 * ((rank + number) % RANKS))
            found.append(meeting.gather({"rank": rank, "number": number}))
        return found

    with ThreadPoolExecutor(RANKS) as pool:
        everywhere = list(pool.map(meet, range(RANKS)))
    expected = [[{"rank": rank, "number": number} for rank in range(RANKS)] for number in range(5)]
    assert everywhere == [expected] * RANKS
    assert store.num_keys() == 0


def test_one_process_is_first() -> None:
    store = dist.HashStore()
    assert [Meeting(store, rank, RANKS).is_first_to("speak") for rank in (2, 0, 1)] == [True, False, False]


def test_a_wait_ends_with_its_time_and_with_a_signal() -> None:
    with pytest.raises(TimeoutError, match=r"did not come within 0\.05 s"):
        Meeting(dist.HashStore(), 1, RANKS, longest_s=0.05).gather(None)

    def stop(number: int, frame: Any) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(InterruptedError):
            Meeting(dist.HashStore(), 1, RANKS).gather(None)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_processes_whose_store_has_gone_end_without_a_message_of_their_own() -> None:
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = Meeting(dist.TCPStore("localhost", server.port, is_master=False), 1, RANKS)
    del server
    with pytest.raises(LostProcessError, match="rank 0 has ended"):
        client.gather(None)
    assert client.is_first_to("say an error")


@pytest.mark.parametrize(
    ("said", "ranks", "is_lost"),
    [
        ("[pair.cc:553] Connection closed by peer [127.0.0.1]:35225. This is typically caused by", 2, True),
        ("[pair.cc:537] Read error [127.0.0.1]:57516: Connection reset by peer. This is", 2, True),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.27", 2, True),
        ("Connection reset by peer", 1, False),
        ("mat1 and mat2 shapes cannot be multiplied", 2, False),
    ],
)
def test_what_torch_says_of_a_killed_process_is_one_line(
    monkeypatch: pytest.MonkeyPatch, said: str, ranks: int, is_lost: bool
) -> None:
    monkeypatch.setattr(ranks_module, "own_rank", lambda: (0, ranks))
    with pytest.raises(LostProcessError if is_lost else RuntimeError) as caught, lost_processes():
        raise RuntimeError(said)
    assert ("Another process has ended" in str(caught.value)) == is_lost


def test_an_error_of_one_process_reaches_the_others_wherever_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    store, local = dist.HashStore(), threading.local()
    monkeypatch.setattr(ranks_module, "launched", lambda: local.meeting)

    def work(rank: int) -> str:
        local.meeting = Meeting(store, rank, RANKS)
        with pytest.raises(SharedError) as caught, errors_shared():
            if rank == 2:
                raise UserError("no room")
            if rank == 1:
                wait_for_all()
            with errors_shared():
                assert rank == 0
        return f"{caught.value} {gather(rank)}"  # and afterwards they meet again

    with ThreadPoolExecutor(RANKS) as pool:
        assert list(pool.map(work, range(RANKS))) == ["no room [0, 1, 2]"] * RANKS
