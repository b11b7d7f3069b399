"""What every command shares: a user's error is printed as one line, with exit code 2."""

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ast_sparse.errors import LostProcessError, SharedError, UserError
from ast_sparse.kernels.cpu import setting

USER_ERROR_EXIT = 2
INTERRUPT_EXIT = 130
_FAILURE_EXIT = 1
_PRINT_S = 1.0  # time for one process to print the error: a launcher ends the others as soon as one exits

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # hints for people who write code; warnings stay
os.environ.setdefault("TQDM_DELAY", "1")  # no progress bar for anything shorter than a second
for _noisy in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, if it is installed, in every command
    logging.getLogger(_noisy).setLevel(logging.ERROR)


class _OneLine(click.Command):
    """Prints a user's error, including a wrong option, as one line and exits with 2; Ctrl-C exits with 130."""

    shares_work = False  # with the other processes of a launcher

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        from ast_sparse.progress import lines_for_bars  # imports tqdm, which reads the environment once

        with _one_line_errors(), lines_for_bars():
            if not self.shares_work:
                _refuse_launcher()
            setting.requested()  # a wrong value of its environment variable is an error before the command starts
            code = super().main(*args, **kwargs)
        sys.exit(code if isinstance(code, int) else 0)


class Command(_OneLine):
    """A click command whose errors are one line."""


class SharedCommand(Command):
    """One that the processes of a launcher run together."""

    shares_work = True


class Group(_OneLine, click.Group):
    """A click command with subcommands, whose errors are one line."""


def _refuse_launcher() -> None:
    """Raise UserError if a launcher has started several processes, which would all do the same and write the same."""
    if _has_others() and "LOCAL_RANK" in os.environ:  # some clusters set the others for every command
        raise UserError(
            f"This command runs in one process, but a launcher started {os.environ['WORLD_SIZE']}. Start it without "
            "torchrun or accelerate launch; in a script that they have started, unset LOCAL_RANK for it."
        )


@contextmanager
def settings_as_options(options: Mapping[str, str]) -> Iterator[None]:
    """Make errors name the option that a setting came from, such as `--seq-len` for `calibration.seq_len`."""
    try:
        yield
    except UserError as error:
        raise error.renamed(options) from error


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except LostProcessError as error:
        _fail(str(error), _FAILURE_EXIT)  # the process that speaks for all may be the lost one
    except UserError as error:
        _fail(str(error), USER_ERROR_EXIT, has_many=isinstance(error, SharedError))
    except click.ClickException as error:
        _fail(error.format_message(), USER_ERROR_EXIT)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted.", INTERRUPT_EXIT)


def _fail(message: str, code: int, has_many: bool = False) -> NoReturn:
    """Print the error and exit; of the processes of a launcher only one prints.

    Args:
        has_many: other processes have the same error.
    """
    is_said = code != INTERRUPT_EXIT and _is_said(has_many)
    if not is_said:
        click.echo(f"Error: {' '.join(message.split())}", err=True)
    if is_said or _has_others():
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the launcher, when another process exits
        time.sleep(_PRINT_S)  # also the one that prints: it may serve the store that the others ask
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


def _has_others() -> bool:
    """Whether a launcher started more processes; torch takes seconds to import, so it is not asked."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def _is_said(has_many: bool) -> bool:
    """Whether another process prints an error of the user."""
    if _has_others():
        from ast_sparse.distributed.meeting import is_first_of_launch_to

        if (is_first := is_first_of_launch_to("say an error")) is not None:
            return not is_first
    return has_many and os.environ.get("RANK", "0") != "0"
