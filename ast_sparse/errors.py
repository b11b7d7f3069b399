"""The errors a user can fix: one line that names the field or file, the value and the fix."""

from typing import Any

_LONGEST_SHOWN = 200  # characters of a value in a message


class UserError(ValueError):
    """A wrong setting, file or model. Commands print it as one line and exit with code 2."""


class SharedError(UserError):
    """An error that every process of a distributed run gets; the first one says so."""


class DivergenceError(UserError):
    """Training produced a loss or weights that are not finite, or a model that is measured does."""


def shown(value: Any) -> str:
    """A value for a message: as Python writes it, on one line and not too long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} …"


def shown_name(name: Any) -> str:
    """A key for a message: as it stands where it is a plain name, else as `shown` has it."""
    text = str(name)
    return text if text.isprintable() and len(text) <= _LONGEST_SHOWN else shown(name)


def kind_of(value: Any) -> str:
    """What a person calls a YAML value: `text`, `a list`, `empty`."""
    if value is None:
        return "empty"
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return names.get(type(value), type(value).__name__)
