"""Checks and conversion of a setting's value against its type hint."""

import enum
import math
import types
import typing
from typing import Any, Literal, Union

from ast_sparse.errors import UserError, did_you_mean, kind_of, shown

_LARGEST_INTEGER = 10**40  # far beyond any setting, and a float can still hold it
_TRUE, _FALSE = ("yes", "on", "true"), ("no", "off", "false")


def convert(value: Any, hint: Any, name: str) -> Any:
    """Check a value against a type hint, and convert it if its meaning is clear.

    A bool field accepts yes/no/on/off, a float field an integer, a tuple field a single entry. Values of hints that
    this function does not know (nested dataclasses) are not checked.

    Raises:
        UserError: the value has another type, or a number in it is not finite or unreasonably large.
    """
    _check_numbers(value, name)
    fits, converted = _convert(value, hint)
    if not fits:
        near = did_you_mean(value, _choices(hint))
        expected = f"expected {_describe(hint)}. {near}".rstrip()
        raise UserError(f"{name}={shown(value)} is {kind_of(value)}, {expected}", name)
    return converted


def _check_numbers(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value} is not a finite number. Give a finite one.", name)
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise UserError(f"{name}={shown(value)} is too large. Give a smaller one.", name)
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_numbers(entry, name)


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values allowed by a Literal or by an enum in a union (`SchedulerType | str`); empty for other hints."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return args
    if origin in (Union, types.UnionType):
        enums = [arg for arg in args if isinstance(arg, type) and issubclass(arg, enum.Enum)]
        return tuple(member.value for arg in enums for member in arg)
    return ()


def _convert(value: Any, hint: Any) -> tuple[bool, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if choices := _choices(hint):
        return value in choices and not isinstance(value, bool), value
    if origin in (Union, types.UnionType):
        results = [_convert(value, arg) for arg in _exact_first(value, args)]
        return next((result for result in results if result[0]), (False, value))
    if origin is tuple:
        entries = list(value) if isinstance(value, list | tuple) else [value]
        converted = [_convert(entry, args[0]) for entry in entries]
        return all(fits for fits, _ in converted) and value is not None, tuple(entry for _, entry in converted)
    if origin in (dict, list):
        return isinstance(value, origin), value
    if hint is bool:
        if isinstance(value, str) and value.lower() in _TRUE + _FALSE:
            return True, value.lower() in _TRUE
        return isinstance(value, bool), value
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number, float(value) if number else value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint in (str, dict, list, type(None)):
        return isinstance(value, hint), value
    return True, value


def _exact_first(value: Any, hints: tuple[Any, ...]) -> list[Any]:
    """The alternatives of a union, the value's own type first: `5` stays an int in `int | float`."""
    return sorted(hints, key=lambda hint: hint is not type(value))


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if choices := _choices(hint):
        return " or ".join(repr(choice) for choice in choices)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(arg) for arg in args))
    if origin is tuple:
        return f"{_describe(args[0])}, or a list of these"
    names = {
        bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null",
        dict: "a mapping", list: "a list",
    }  # fmt: skip
    return names.get(origin or hint, getattr(hint, "__name__", str(hint)))
