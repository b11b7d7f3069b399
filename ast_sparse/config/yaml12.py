"""YAML with the scalars of YAML 1.2, which read as people expect.

PyYAML alone follows YAML 1.1, where `2:4` is 124, `2e-5` is text and `no` is False. Here `2:4` stays text, `2e-5` is a
number, `010` is ten and only `true` and `false` are bools. Repeated keys and tags are errors. What `dump_yaml` writes
is read back unchanged.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from ast_sparse.errors import UserError, kind_of, one_line, shown, shown_name

_LARGEST_FILE = 2**20  # bytes; a list of 10,000 paths is smaller
_MOST_VALUES = 100_000  # entries; an alias counts as many as what it refers to ...
_LONG_TEXT = 64  # ... and a text one more for each of this many characters
_DEEPEST = 32  # levels of nested mappings and lists
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # YAML escapes can produce them, but paths and text files cannot have them


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, unreadable, empty, too large, not UTF-8, not valid YAML, or not a mapping.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"Config {str(path)!r} {what}. Give the path of a YAML file to --config.")
    try:
        with path.open("rb") as stream:
            data = stream.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            raise UserError(
                f"Config {str(path)!r} is larger than 1 MiB. Use globs for long lists of files, or give another file."
            )
        text = data.decode("utf-8-sig")
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
    """The value of a YAML text.

    Args:
        name: what the text is, for errors, which also give line and column.

    Raises:
        UserError: not valid YAML, a tag, or more levels or (through aliases) values than a configuration needs.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except UserError as error:
        raise UserError(f"{name}, {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{name} is not valid YAML: {_problem(error)}") from None


def dump_yaml(tree: Any) -> str:
    """YAML text that `parse_yaml` reads as the same value; keys keep their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars; a repeated key is an error."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (as the base class declares it)

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._values: dict[yaml.Node, int] = {}  # number of values of every finished node

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As in PyYAML, but limited in size and without tags."""
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise UserError(f"line {line}: the tag {shown_name(event.tag)} is not supported. Write the plain value.")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise UserError(f"line {line}: more than {_DEEPEST} levels deep. A configuration has fewer.")
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._values:
                raise UserError(f"line {line}: *{shown_name(event.anchor)} contains itself. Write the value out.")
            return node
        if isinstance(node, yaml.MappingNode):
            below = sum(self._values[part] for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            below = sum(self._values[entry] for entry in node.value)
        else:
            below = len(node.value) // _LONG_TEXT
        self._values[node] = 1 + below
        if self._values[node] > _MOST_VALUES:
            raise UserError(f"line {line}: more than {_MOST_VALUES:,} values. A configuration has fewer.")
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and _NO_TEXT.search(value):
            raise UserError(f"line {node.start_mark.line + 1}: {shown(value)} has an invalid character. Remove it.")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                line = key_node.start_mark.line + 1
                raise UserError(f"line {line}: key {shown(key)} is {kind_of(key)}. Keys are names.")
            if key in seen:
                raise UserError(f"line {key_node.start_mark.line + 1}: key {shown(key)} appears twice. Keep one.")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text that YAML 1.2 would read as something else (`1e5`, `09`)."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (as the base class declares it)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 1.1 would read 010 as 8 and 2:4 as 124


_RESOLVERS = {
    "null": (r"^(~|null|Null|NULL|)$", [*"~nN", ""]),
    "bool": (r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"^[-+]?[0-9]+$", list("-+0123456789")),
    "float": (
        r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
}
for _tag, (_pattern, _first) in _RESOLVERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}."
    return "".join(c if c.isprintable() else "�" for c in one_line(error, end="stop"))
