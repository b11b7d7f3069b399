"""What every command shares: errors of the user end as one line and exit code 2."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, ParamSpec, TypeVar

import click

from ast_sparse.errors import UserError

USER_ERROR_EXIT = 2
INTERRUPT_EXIT = 130

P = ParamSpec("P")
R = TypeVar("R")

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # hints for people who write code; warnings stay


def user_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command's function: a UserError prints `Error: …` in one line and exits with 2, Ctrl-C with 130."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with _one_line_errors():
            return function(*args, **kwargs)

    return wrapper


class Command(click.Command):
    """A click command that reports wrong options like every other error of the user: `@click.command(cls=Command)`."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        kwargs["standalone_mode"] = False
        with _one_line_errors():
            code = super().main(*args, **kwargs)
        sys.exit(code if isinstance(code, int) else 0)


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
