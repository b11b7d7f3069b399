"""Errors that a user can fix: one line that names the field or file, the value and the fix."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self

_LONGEST_SHOWN = 200  # characters of a value in a message


class UserError(ValueError):
    """A wrong setting, file or model. Commands print it as one line and exit with code 2.

    Args:
        message: names the setting or file, the value and the fix.
        fields: settings as the message names them (`calibration.samples`), if a command may use other names for them.
    """

    def __init__(self, message: str, *fields: str) -> None:
        if message.startswith("Caught "):  # torch makes an error of a DataLoader's worker anew, from its traceback
            message = message.rstrip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(message)
        self.fields = fields

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same error with other names for its fields."""
        message = str(self)
        for field in self.fields:
            message = message.replace(field, names.get(field, field))
        return type(self)(message, *(names.get(field, field) for field in self.fields))


class SharedError(UserError):
    """An error raised on every process of a distributed run; only the first process prints it."""


class LostProcessError(SharedError):
    """Another process of the run has ended. Commands exit with 1: the settings are not to blame."""


class DivergenceError(UserError):
    """Training, or the evaluation of a model, produced a loss or weights that are not finite."""


def shown(value: Any) -> str:
    """A value as a message shows it: Python's repr, on one line and not too long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} …"


def shown_name(name: Any) -> str:
    """A key as a message shows it: unchanged if it is a plain name, otherwise as `shown` writes it."""
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


def one_line(
    error: BaseException,
    limit: int | None = None,
    *,
    cut: Literal["sharp", "marked", "word"] = "sharp",
    end: Literal["kept", "open", "stop", "mark"] = "kept",
    named: bool = False,
) -> str:
    """The message of another library's error on one line; the name of its class if the message is empty.

    Args:
        limit: maximum number of characters.
        cut: how a longer text is cut: at the last character that fits (sharp), the same with "…" after it (marked), or
            at the last word that fits, with "…" after it (word).
        end: how the text ends: unchanged (kept), without full stops, for a sentence that continues (open), always with
            a full stop (stop), or with a full stop unless it ends with another mark (mark).
        named: put the class before a one-word text, such as `'relux'` from a KeyError.
    """
    text = " ".join(str(error).split())
    if end == "open":
        text = text.rstrip(".")
    if not text or (named and " " not in text):
        text = f"{type(error).__name__} {text}".rstrip()
    if limit is not None and len(text) > limit:
        text = text[:limit]
        if cut != "sharp":
            text = f"{text.rsplit(' ', 1)[0] if cut == 'word' else text} …"
    closed = end in ("kept", "open") or text.endswith((".", "…", "!", "?") if end == "mark" else ".")
    return text if closed else f"{text}."


def did_you_mean(value: Any, known: Iterable[Any], quoted: Callable[[str], str] = repr) -> str:
    """A question with the known value closest to a wrong one: `Did you mean 'bandit'?`; empty if none is close.

    Args:
        quoted: how the name is written.
    """
    near = difflib.get_close_matches(str(value), [str(each) for each in known], n=1)
    return f"Did you mean {quoted(near[0])}?" if near else ""
