"""The errors a user can fix: one line that names the field or file, the value and the fix."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self

_LONGEST_SHOWN = 200  # characters of a value in a message


class UserError(ValueError):
    """A wrong setting, file or model. Commands print it as one line and exit with code 2.

    Args:
        message: names the setting or file, the value and the fix.
        fields: settings as the message names them (`calibration.samples`), where a command may call them otherwise.
    """

    def __init__(self, message: str, *fields: str) -> None:
        super().__init__(message)
        self.fields = fields

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same error with other names for its fields."""
        message = str(self)
        for field in self.fields:
            message = message.replace(field, names.get(field, field))
        return type(self)(message, *(names.get(field, field) for field in self.fields))


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


def one_line(
    error: BaseException,
    limit: int | None = None,
    *,
    cut: Literal["sharp", "marked", "word"] = "sharp",
    end: Literal["kept", "open", "stop", "mark"] = "kept",
    named: bool = False,
) -> str:
    """What another library's error says, on one line; the name of its class where it says nothing.

    Args:
        limit: characters that are shown of it.
        cut: what a longer text ends with: its last character that fits (sharp), that and "…" (marked), or the last
            word that fits and "…" (word).
        end: how the text ends: as it is (kept), without full stops, for a sentence that goes on (open), always with a
            full stop (stop), or with a full stop unless another mark ends it (mark).
        named: put the class before a text of one word, such as `'relux'` of a KeyError.
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
    """A question that names the known value nearest to a wrong one: `Did you mean 'bandit'?`; empty if none is near.

    Args:
        quoted: how the name is written.
    """
    near = difflib.get_close_matches(str(value), [str(each) for each in known], n=1)
    return f"Did you mean {quoted(near[0])}?" if near else ""
