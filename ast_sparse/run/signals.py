"""Signals with which a scheduler asks a run to stop: the run stops when it can be resumed."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# EX_TEMPFAIL of sysexits.h, "try again later": not success, not an error (1, 2), and not the code of a kill (128 + N),
# so a scheduler can requeue on it (Slurm: scontrol requeue; Kubernetes: podFailurePolicy on exit codes)
PREEMPTED_EXIT = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_REPEAT_S = 1.0  # a process may get one signal twice: from the scheduler, and passed on by the launcher
_AGAIN_S = 0.05


class Preempted(KeyboardInterrupt):
    """A signal stopped the run. A KeyboardInterrupt, so that libraries clean up; its text is one line, or empty."""


class PreemptionSignals:
    """The received signal, and whether it stops the run at once or at the end of a step.

    Attributes:
        received: the first signal.
        restart: how to start the run again, for the message if nothing has been saved.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.restart = "start it again with the same command"
        self.is_training = False
        self._received_at = 0.0
        self._again: threading.Timer | None = None
        self._at_once = True
        self._owner = os.getpid()

    def begin_training(self) -> None:
        """Training begins: from now on a signal waits for the end of the step.

        Raises:
            Preempted: a signal was received before.
        """
        self._stop_if_received()
        self._at_once, self.is_training = False, True

    def finish(self) -> None:
        """Training is complete: from now on a signal waits for the end of the run."""
        self._at_once, self.is_training = False, False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the block finish before a signal stops the run, so that the files it writes are complete.

        Raises:
            Preempted: a signal was received in the block.
        """
        before, self._at_once = self._at_once, False
        try:
            yield
        finally:
            self._at_once = before
        if before:
            self._stop_if_received()

    def handle(self, number: int, frame: Any) -> None:
        """The signal handler.

        Raises:
            Preempted: before training, when there is nothing to save.
        """
        if os.getpid() != self._owner:  # forked: a worker exits on SIGTERM, as its pool expects; the run does the rest
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
            if number == signal.SIGTERM:
                os.kill(os.getpid(), number)
            return
        if self.received is not None and self._again is None:
            if time.monotonic() - self._received_at >= _REPEAT_S:
                os._exit(128 + number)
            return
        self._again = None
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        if self._at_once:
            self._stop_if_received()
        if os.environ.get("RANK", "0") != "0":  # a scheduler signals all ranks
            return
        what = "the step and its checkpoint" if self.is_training else "what is being written"
        # not `print`, which fails if the signal interrupted another print
        os.write(2, f"\n{self.received.name}: {what} will be finished; a second signal stops at once.\n".encode())

    def not_raised(self, what: Any) -> bool:
        """A `sys.unraisablehook`: whether it is `Preempted`, which came where Python ignores exceptions (`__del__`).

        Then the signal is sent again as soon as Python has left that place.
        """
        if not isinstance(what.exc_value, Preempted) or self.received is None:
            return False
        self._again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), self.received))
        self._again.daemon = True
        self._again.start()
        return True

    def end(self) -> None:
        """Send nothing again: the handlers are gone."""
        if self._again is not None:
            self._again.cancel()

    def _stop_if_received(self) -> None:
        if self.received is not None:
            raise Preempted(f"{self.received.name}: stopped before training began, nothing was saved; {self.restart}.")


@contextmanager
def preemption_signals() -> Iterator[PreemptionSignals]:
    """Catch SIGTERM and SIGUSR1 in the block; do nothing outside the main thread, where Python cannot catch them."""
    signals = PreemptionSignals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    show = sys.unraisablehook
    before = {number: signal.signal(number, signals.handle) for number in SIGNALS}
    sys.unraisablehook = lambda what: None if signals.not_raised(what) else show(what)
    try:
        yield signals
    finally:
        signals.end()
        sys.unraisablehook = show
        for number, handler in before.items():
            signal.signal(number, handler)
