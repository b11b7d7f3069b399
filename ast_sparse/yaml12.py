"""YAML with the scalars of YAML 1.2, read as a person means them.

PyYAML alone follows YAML 1.1, where `2:4` is 124, `2e-5` is text and `no` is False. Here `2:4` stays text, `2e-5` is a
number, `010` is ten and only `true` and `false` are bools. A key that stands twice is an error.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from ast_sparse.errors import UserError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises:
        UserError: the file is missing, unreadable, empty, not UTF-8, no valid YAML, or holds something else.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"Config {str(path)!r} {what}. Give the path of a YAML file to --config.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"Config {str(path)!r} cannot be read ({error.strerror}). Give a readable file.") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        raise UserError(f"Config {str(path)!r} is empty. It needs at least the sections model and data.")
    if not isinstance(tree, dict):
        what = kind_of(tree)
        raise UserError(f"Config {str(path)!r} is {what}, not a mapping. Start with the sections model and data.")
    return tree


def parse_yaml(text: str, name: str) -> Any:
    """The value of some YAML text.

    Raises:
        UserError: no valid YAML; `name` says whose, and the line and column follow.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except UserError as error:
        raise UserError(f"{name}, {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{name} is no valid YAML: {_problem(error)}") from None


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


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars; a repeated key is an error."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (as the base class declares it)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise UserError(f"line {key_node.start_mark.line + 1}: key {key!r} is {kind_of(key)}. Keys are names.")
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice. Keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 1.1 would read 010 as 8 and 2:4 as 124


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), [*"~nN", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}."
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."
