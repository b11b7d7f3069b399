"""Chat data in files: recognised by the names of its columns, as TRL does, and read row by row."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ast_sparse.data.sources.text_files import json_rows, shown
from ast_sparse.errors import UserError, one_line

ROW = "ast_sparse.row"  # a column with whole rows as JSON, whatever is in their messages; no data set has this name
SETTINGS = "chat_template_kwargs"  # variables of the template, by row
_OPTIONAL = ("tools", SETTINGS)


def chat_columns(names: Collection[str]) -> list[str]:
    """The columns that make a data set chat data; none if it is raw text."""
    more = [name for name in _OPTIONAL if name in names]
    if {"prompt", "completion"} <= set(names):
        return ["prompt", "completion", *more]
    if ROW in names:
        return [ROW]
    return ["messages", *more] if "messages" in names else []


def chat_columns_of_file(file: Path, kind: str) -> list[str]:
    """The same for a file, from the first row of JSONL or the schema of parquet; none if it cannot be read.

    Args:
        kind: json, parquet or text.
    """
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            return chat_columns(pq.read_schema(file).names)
        row, _ = next(json_rows(file), ({}, "")) if kind == "json" else ({}, "")
    except (UserError, OSError, EOFError, ValueError, zlib.error):  # reported when it is read as text
        return []
    return chat_columns(row) if isinstance(row, dict) else []


def json_conversations(files: tuple[Path, ...], columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of JSONL files as the column `ROW`.

    Raises:
        UserError: a line that lacks a column, or a file that cannot be read.
    """
    for file in files:
        try:
            for row, where in json_rows(file):
                for column in columns:
                    if column not in _OPTIONAL and (not isinstance(row, Mapping) or row.get(column) is None):
                        raise UserError(f"{where}: no `{column}`, which the first line has. Leave the line out.")
                # optional columns may begin after the first line
                more = [column for column in _OPTIONAL if column not in columns and row.get(column) is not None]
                yield {ROW: json.dumps({column: row.get(column) for column in (*columns, *more)})}
        except (OSError, EOFError, zlib.error) as error:  # including a damaged .gz or .zst
            reason = one_line(error, 300, end="stop")
            raise UserError(f"{file} cannot be read: {reason} Copy it again, or fix its permissions.") from error


def read_row(row: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a conversation as one row, decoded from the column `ROW` if there is one.

    Args:
        features: of the columns. Arrow gives all rows the same keys and fills missing ones with null, which is removed.
    """
    if ROW in row:
        return dict(json.loads(row[ROW]))
    return {name: without_filled(value, features[name]) for name, value in row.items()}


def without_filled(value: Any, feature: Any) -> Any:
    """A value without the keys that Arrow filled with null; what a feature stores as JSON stays as it is."""
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: without_filled(item, feature.get(key)) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [without_filled(item, inner) for item in value]
    return value


def read_tools(value: Any, where: str) -> list[Any] | None:
    """The tools of a row, None without any; the list, each tool and its parameters may be JSON strings."""
    tools = _decoded(value, "tools", where)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError(f"{where}: `tools` is {shown(tools)}, not a list of tools. Leave the row out.")
    found = []
    for tool in (_decoded(tool, "tools", where) for tool in tools):
        if not isinstance(tool, dict):
            raise UserError(f"{where}: `tools` contains {shown(tool)}, which is not a JSON schema. Leave the row out.")
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("parameters"), str):
            function = {**function, "parameters": _decoded(function["parameters"], "parameters", where)}
            tool = {**tool, "function": function} if "function" in tool else function
        found.append(tool)
    return found


def read_settings(value: Any, where: str) -> dict[str, Any]:
    """The variables that a row gives the template.

    Raises:
        UserError: they are not a mapping.
    """
    settings = _decoded(value, SETTINGS, where) or {}
    if not isinstance(settings, dict):
        raise UserError(f"{where}: `{SETTINGS}` is {shown(settings)}, not a mapping. Leave the row out.")
    return settings


def _decoded(value: Any, column: str, where: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value or None
    except ValueError:
        raise UserError(f"{where}: `{column}` is {shown(value)}, which is not JSON. Leave the row out.") from None
