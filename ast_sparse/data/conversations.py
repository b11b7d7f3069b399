"""Chat data as it lies in files: recognised by the names of its columns, as TRL does, and read row by row."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ast_sparse.data.files import json_rows, one_line
from ast_sparse.errors import UserError

ROW = "conversation"  # a column of rows as JSON, whatever their messages hold


def chat_columns(names: Collection[str]) -> list[str]:
    """The columns that make a data set chat data; none where it is raw text."""
    if {"prompt", "completion"} <= set(names):
        return ["prompt", "completion"]
    if ROW in names:
        return [ROW]
    return [name for name in ("messages", "tools") if name in names] if "messages" in names else []


def chat_columns_of_file(file: Path, kind: str) -> list[str]:
    """The same of a file, by the first row of JSONL or the schema of parquet; none where it cannot be read.

    Args:
        kind: of the file: json, parquet or text.
    """
    try:
        if kind == "parquet":
            import pyarrow.parquet as pq

            return chat_columns(pq.read_schema(file).names)
        row, _ = next(json_rows(file), ({}, "")) if kind == "json" else ({}, "")
    except (UserError, OSError, EOFError, ValueError, zlib.error):  # said when it is read as text
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
                    if column != "tools" and (not isinstance(row, Mapping) or row.get(column) is None):
                        raise UserError(f"{where}: no `{column}`, which the first line has. Leave the line out.")
                yield {ROW: json.dumps({column: row.get(column) for column in columns})}
        except (OSError, EOFError, zlib.error) as error:  # a damaged .gz or .zst among them
            raise UserError(f"{file} cannot be read: {one_line(error)} Copy it again, or mend its rights.") from error


def read_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row by the columns of its conversation, out of the column `ROW` where it stands there."""
    return dict(json.loads(row[ROW])) if ROW in row else row
