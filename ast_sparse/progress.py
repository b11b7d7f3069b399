"""Progress: tqdm's bars on a terminal and in a notebook; lines now and then if stderr is a file (Slurm, CI).

A bar redraws itself with carriage returns, and a log file would keep every one of its states.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm as auto_bar
from tqdm.std import tqdm as plain_bar

_INTERVAL_S = 30.0  # between two lines
_LONGEST_INTERVAL_S = 600.0
_SHARE = 0.05  # of the time so far: a long job prints lines less often
_SHORT_S = 1.0  # a shorter job prints nothing


def shows_bars() -> bool:
    """Whether bars can redraw themselves: stderr is a terminal, or this is a notebook."""
    return "ipykernel.zmqshell" in sys.modules or sys.stderr.isatty()


def progress_bar(*args: Any, **kwargs: Any) -> Any:
    """A bar with the arguments of `tqdm` if bars are shown; otherwise one that prints lines, see `LineBar`."""
    return auto_bar(*args, **kwargs) if shows_bars() else LineBar(*args, **kwargs)


class LineBar(plain_bar):
    """A tqdm that prints a line every half minute, later every 5% of the elapsed time, but at least every ten minutes.

    The last line is printed at the end. A job of less than a second prints nothing. In a distributed run only the
    first process prints.
    """

    disable: bool

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line if one is due."""
        if not hasattr(self, "start_t"):  # tqdm draws once before it looks at the clock
            return True
        elapsed, last = self._time() - self.start_t, getattr(self, "_line_at", 0.0)
        if elapsed - last >= min(max(_INTERVAL_S, _SHARE * elapsed), _LONGEST_INTERVAL_S):
            self._line_at = elapsed
            _print(self, elapsed)
        return True

    def close(self) -> None:
        """Print the last line."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)
        if (elapsed := self._time() - self.start_t) >= _SHORT_S:
            _print(self, elapsed)

    def clear(self, nolock: bool = False) -> None:
        """Do nothing: lines are not cleared."""

    def moveto(self, n: int) -> None:
        """Do nothing: lines are not moved."""


def _print(bar: Any, elapsed: float) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    text = line(bar.format_dict, elapsed)
    if text == getattr(bar, "_said", None):  # the last line was already printed just before the end
        return
    bar._said = text
    try:
        bar.fp.write(f"{text}\n")
        bar.fp.flush()
    except ValueError:  # the stream was closed before the bar
        return


def line(state: dict[str, Any], elapsed: float) -> str:
    """The state of a bar in words: `Encoding: 45% (90/200 tensors, 0:31 elapsed, 0:38 left)`.

    Args:
        state: tqdm's `format_dict`.
        elapsed: seconds.
    """
    n, total, unit = state["n"], state["total"], state["unit"].strip()
    before = f"{state['prefix'].removesuffix(': ')}: " if state["prefix"] else ""
    spent = f"{_clock(elapsed)} elapsed"
    after = f", {state['postfix']}" if state["postfix"] else ""
    if not total:
        return f"{before}{_count(_number(n, state), unit, n)}, {spent}{after}"
    done = n - state["initial"]
    left = f", {_clock(elapsed / done * (total - n))} left" if done > 0 and n < total else ""
    count = _count(f"{_number(n, state)}/{_number(total, state)}", unit, total)
    return f"{before}{100 * n // total:.0f}% ({count}, {spent}{left}{after})"


def _number(n: float, state: dict[str, Any]) -> str:
    return plain_bar.format_sizeof(n, divisor=state["unit_divisor"]) if state["unit_scale"] else f"{n:,}"


def _count(number: str, unit: str, n: float) -> str:
    """A number with its unit in the plural; tqdm's default unit `it` is left out."""
    if unit == "it":
        return number
    plural = "es" if unit.endswith("ch") else "" if unit.endswith("s") or len(unit) == 1 or n == 1 else "s"
    return f"{number} {unit}{plural}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def close_bars() -> None:
    """Close the bars that an exception left open: otherwise they would be drawn once more below its message."""
    for bar in list(plain_bar._instances):
        bar.close()


@contextmanager
def library_bars(shown: bool) -> Iterator[None]:
    """Show or hide the bars of datasets and transformers in the block; the setting is restored afterwards."""
    import datasets
    from transformers.utils import logging

    if shown or datasets.are_progress_bars_disabled():
        yield
        return
    had_bars = logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def lines_for_bars() -> Iterator[None]:
    """Let the tqdm bars of other libraries print lines too if bars are not shown.

    Loading weights, reading and tokenising data, and the tasks of the harness make their own bars and do not let us
    choose the class, so tqdm itself gets the methods of `LineBar` until the block ends.
    """
    names = () if shows_bars() else ("display", "close", "clear", "moveto")
    before = {name: getattr(plain_bar, name) for name in names}
    for name in names:
        setattr(plain_bar, name, getattr(LineBar, name))
    try:
        yield
    finally:
        close_bars()
        for name, method in before.items():
            setattr(plain_bar, name, method)
