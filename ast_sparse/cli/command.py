"""What every command shares: a user's error is printed as one line, with exit code 2."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from ast_sparse.errors import UserError
from ast_sparse.kernels.cpu import setting

USER_ERROR_EXIT = 2
INTERRUPT_EXIT = 130

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # hints for people who write code; warnings stay
os.environ.setdefault("TQDM_DELAY", "1")  # no progress bar for anything shorter than a second


class _OneLine(click.Command):
    """Prints a user's error, including a wrong option, as one line and exits with 2; Ctrl-C exits with 130."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        from ast_sparse.progress import lines_for_bars  # imports tqdm, which reads the environment once

        with _one_line_errors(), lines_for_bars():
            setting.requested()  # a wrong value of its environment variable is an error before the command starts
            code = super().main(*args, **kwargs)
        sys.exit(code if isinstance(code, int) else 0)


class Command(_OneLine):
    """A click command whose errors are one line."""


class Group(_OneLine, click.Group):
    """A click command with subcommands, whose errors are one line."""


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
    except UserError as error:
        _fail(str(error), USER_ERROR_EXIT)
    except click.ClickException as error:
        _fail(error.format_message(), USER_ERROR_EXIT)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted.", INTERRUPT_EXIT)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)
