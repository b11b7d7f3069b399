"""What every section of the settings shares: typed fields with a help text, checked when a section is made."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from ast_sparse.config.convert import convert
from ast_sparse.errors import UserError, shown


def about(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class Section:
    """Checks the type of every field; subclasses check values in `_validate`."""

    _name = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = convert(getattr(self, item.name), hints[item.name], f"{self._name}.{item.name}")
            object.__setattr__(self, item.name, value)
        self._validate()

    def _validate(self) -> None: ...

    def _require(self, condition: bool, key: str, problem: str) -> None:
        if not condition:
            field = f"{self._name}.{key}"
            raise UserError(f"{field}={shown(getattr(self, key))} {problem}", field)

    def to_dict(self) -> dict[str, Any]:
        """The section as plain YAML values."""
        return {
            item.name: list(value) if isinstance(value := getattr(self, item.name), tuple) else value
            for item in dataclasses.fields(self)
        }
