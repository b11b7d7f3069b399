"""Read text from its sources: files and hub data sets become documents.

Every entry (`entries`) becomes a memory-mapped `datasets.Dataset` with one document a row, or is read once, document by
document, to be written into shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from datasets.table import CastError

from ast_sparse.data.sources.conversations import ROW, chat_columns, chat_columns_of_file, json_conversations, read_row
from ast_sparse.data.sources.entries import Entry, file_stamps, text_files
from ast_sparse.data.sources.text_files import file_documents, json_rows, name_text, shown
from ast_sparse.errors import UserError, one_line

_FORMAT_VERSION = 1  # part of the cache key of files: raise it when they are read differently
_OPTIONAL_READ = 1  # the same for conversations


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry: its name for messages, and its documents (`text_field`, one document a row) or conversations."""

    name: str
    documents: Dataset
    text_field: str
    is_chat: bool = False  # rows have the columns of `chat_columns`


def load_documents(
    entries: Sequence[Entry], root: str | None, text_field: str, field: str = "data.train"
) -> list[Source]:
    """Read every entry through `datasets`: memory-mapped, cached, one document a row.

    A text file is one document, a JSONL line is one (its `text_field`), a row of parquet or of a hub data set is one.

    Args:
        entries: paths or globs relative to `root`, or mappings of `datasets.load_dataset` arguments (`split`: train).
        field: the setting the entries come from, for messages.

    Raises:
        UserError: what `check_sources` finds, a line or row without text, invalid UTF-8, an unknown data set.
    """
    if not entries:
        raise UserError(f"`{field}` names no text. List files or data sets.")
    checked = [text_files(entry, root, field) for entry in entries]
    return [_load(entry, kind, files, text_field) for entry, (kind, files) in zip(entries, checked, strict=True)]


def iterate_documents(
    entries: Sequence[Entry], root: str | None, text_field: str, field: str, streaming: bool = False
) -> Iterator[tuple[str, str]]:
    """The documents of every entry in order, one at a time, each with its place, for messages.

    Files are read once, and nothing is cached.

    Args:
        streaming: read data sets of the hub over the network instead of downloading them; an entry may set it too.

    Raises:
        UserError: as `load_documents`.
    """
    for entry in entries:
        kind, files = text_files(entry, root, field)
        if kind in ("json", "text"):
            yield from file_documents(files, kind, text_field)
        elif isinstance(entry, Mapping):
            name = _hub_name(entry)
            rows = _load_hub(entry, name, text_field, bool(entry.get("streaming", streaming)))
            yield from _column_texts(rows, text_field, name)
        else:
            yield from _column_texts(_load_parquet(files, text_field, streaming=True), text_field, cast(str, entry))


def _column_texts(rows: Dataset | IterableDataset, text_field: str, name: str) -> Iterator[tuple[str, str]]:
    number = 0
    try:
        for number, row in enumerate(rows):
            if not isinstance(text := row[text_field], str):
                raise UserError(f"{name}: row {number}: `{text_field}` is {shown(text)}, not text. Leave it out.")
            yield text, f"{name}, row {number}"
    except UserError:
        raise
    except (OSError, ValueError, DatasetGenerationError) as error:  # a damaged file, or the network
        reason = one_line(error, 300, end="stop")
        raise UserError(f"{name} cannot be read after row {number}: {reason} Copy it again.") from error


def read_texts(entry: str, root: str | None, text_field: str, field: str) -> list[str]:
    """The documents of one file or glob, read into memory. Arguments and errors as in `load_documents`."""
    kind, files = text_files(entry, root, field)
    if kind == "parquet":
        return [text for text, _ in _column_texts(_load_parquet(files, text_field), text_field, entry)]
    return [text for text, _ in file_documents(files, kind, text_field)]


def read_conversations(entry: str, root: str | None, field: str) -> list[dict[str, Any]]:
    """The rows of one file or glob of chat data, read into memory; none if it is raw text.

    Raises:
        UserError: as `load_documents`.
    """
    kind, files = text_files(entry, root, field)
    if not chat_columns_of_file(files[0], kind):
        return []
    documents = _load(entry, kind, files, "").documents
    return [read_row(row, documents.features) for row in documents]


def read_groups(entry: str, root: str | None, text_field: str, by: str, field: str) -> dict[str, list[str]]:
    """The documents of one JSONL or parquet file or glob, grouped by a field; groups are in order of appearance.

    Args:
        by: a field, or the path to a nested one: `meta.domain`. Its values are strings, numbers or booleans.

    Raises:
        UserError: as `read_texts`; the file is plain text, or a row has no such field or no such value in it.
    """
    kind, files = text_files(entry, root, field)
    if kind == "text":
        raise UserError(f"{entry} is plain text, which has no fields to group by. Give .jsonl or .parquet.")
    texts = read_texts(entry, root, text_field, field)
    if kind == "json":
        values = [_group(row, where, by) for file in files for row, where in json_rows(file)]
    else:
        column, top = _parquet_column(files, by), by.split(".")[0]
        values = [_group({top: value}, f"{entry}, row {number}", by) for number, value in enumerate(column, start=1)]
    groups: dict[str, list[str]] = {}
    for text, value in zip(texts, values, strict=True):
        groups.setdefault(value, []).append(text)
    return groups


def _parquet_column(files: list[Path], by: str) -> list[Any]:
    import pyarrow.parquet as pq

    top = by.split(".")[0]
    for file in files:
        if top not in (names := pq.read_schema(file).names):
            raise UserError(f"{file} has no column `{top}`, only {', '.join(names)}. Name one of them.")
    return list(_load_parquet(files, top)[top])


def _group(row: Any, where: str, by: str) -> str:
    value = row
    for name in by.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UserError(f"{where}: no field `{by}` to group by. Name another field, or complete the row.")
        value = value[name]
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: `{by}` is {shown(value)}, not a string or number. Name another field.")
    return str(value)


def _load(entry: Entry, kind: str, files: list[Path], text_field: str) -> Source:
    if isinstance(entry, Mapping):
        name = _hub_name(entry)
        documents = cast(Dataset, _load_hub(entry, name, text_field, may_be_chat=True))
        is_chat = bool(chat_columns(documents.column_names))
        return Source(name=name, documents=documents, text_field=text_field, is_chat=is_chat)
    columns = chat_columns_of_file(files[0], kind)
    if kind == "parquet":
        _check_columns(files, columns)
        documents = cast(Dataset, _load_parquet(files, *(columns or [text_field])))
        return Source(name=entry, documents=documents, text_field=text_field, is_chat=bool(columns))
    if columns:
        return Source(name=entry, documents=_load_chat_files(files, columns), text_field=ROW, is_chat=True)
    return Source(name=entry, documents=_load_files(files, kind, text_field), text_field="text")


def _check_columns(files: list[Path], columns: list[str]) -> None:
    """Raise UserError if a later file of chat data has a column that the first lacks, since it would be lost."""
    for file in files[1:] if columns else ():
        if more := [name for name in chat_columns_of_file(file, "parquet") if name not in columns]:
            raise UserError(
                f"{file} has a column `{more[0]}`, but {files[0]} does not. Write all files with the same columns."
            )


def _hub_name(entry: Mapping[str, Any]) -> str:
    return " ".join(str(entry[key]) for key in ("path", "name", "split") if entry.get(key))


def _load_hub(
    entry: Mapping[str, Any], name: str, text_field: str, streaming: bool = False, may_be_chat: bool = False
) -> Dataset | IterableDataset:
    """The text column alone, or the columns of conversations."""
    kind = IterableDataset if streaming else Dataset
    try:
        loaded = datasets.load_dataset(**{"split": "train", **({"streaming": True} if streaming else {}), **entry})
        # the features of a stream may be unknown until it is read
        columns = loaded.column_names or list(next(iter(loaded), {})) if isinstance(loaded, kind) else []
    except Exception as error:  # whatever the arguments of the entry make `datasets` and its readers raise
        reason = one_line(error, 300).removesuffix(".")
        raise UserError(f"Cannot load data set {name}: {reason}. Check its entry, or the network.") from error
    if not isinstance(loaded, kind):
        fix = "give one `split`" if streaming else "give one `split`, without `streaming`"
        raise UserError(f"Data set {name} loads as {type(loaded).__name__}: {fix}.")
    if may_be_chat and (found := chat_columns(columns)):
        return loaded.select_columns(found)
    if text_field not in columns:
        raise UserError(_no_column(name, text_field, columns))
    return loaded.select_columns([text_field])


def _load_parquet(files: list[Path], *columns: str, streaming: bool = False) -> Dataset | IterableDataset:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            names = pq.read_schema(file).names
        except (pa.ArrowInvalid, OSError) as error:
            reason = one_line(error, 300, end="stop")
            raise UserError(f"{file} is not a parquet file: {reason} Copy or write it again.") from error
        for column in columns:
            if column not in names:
                raise UserError(_no_column(str(file), column, names))
    if not any(pq.read_metadata(file).num_rows for file in files):
        raise UserError(f"{', '.join(map(str, files))} has no rows. Remove it, or give it text.")
    try:
        return cast(
            Dataset | IterableDataset,
            datasets.load_dataset(
                "parquet", data_files=list(map(str, files)), split="train", columns=list(columns), streaming=streaming
            ),
        )
    except DatasetGenerationError as error:
        reason = one_line(error.__cause__ or error, 300, end="stop")
        if len(files) > 1 and isinstance(error.__cause__, TypeError | CastError):  # the schema is wrong, not the file
            raise UserError(
                f"{', '.join(map(str, files))} have columns of different types: {reason} Write all files with the same "
                "types, or give each its own entry."
            ) from error
        raise UserError(f"{', '.join(map(str, files))} is damaged: {reason} Copy or write it again.") from error


def _no_column(name: str, text_field: str, columns: Sequence[str]) -> str:
    return f"{name} has no column `{text_field}`, only {', '.join(columns)}. {name_text(columns)}"


def _load_files(files: list[Path], kind: str, text_field: str) -> Dataset:
    arguments = {"files": tuple(files), "kind": kind, "text_field": text_field}  # `datasets` takes a list as shards
    return _generated(_rows, "text", arguments, (_FORMAT_VERSION, file_stamps(files), kind, text_field))


def _load_chat_files(files: list[Path], columns: list[str]) -> Dataset:
    arguments = {"files": tuple(files), "columns": tuple(columns)}
    return _generated(
        json_conversations, ROW, arguments, (_FORMAT_VERSION, file_stamps(files), ROW, columns, _OPTIONAL_READ)
    )


def _generated(rows: Any, column: str, arguments: dict[str, Any], parts: tuple[Any, ...]) -> Dataset:
    """The data set of a generator whose rows have one column of text, cached under the hash of `parts`."""
    try:
        return cast(
            Dataset,
            Dataset.from_generator(
                rows,
                features=Features({column: Value("large_string")}),  # a string column takes at most 2 GiB
                gen_kwargs=arguments,
                fingerprint=Hasher.hash(parts),
            ),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError | OSError):
            raise error.__cause__ from None
        raise


def _rows(files: tuple[Path, ...], kind: str, text_field: str) -> Iterator[dict[str, str]]:
    for text, _ in file_documents(files, kind, text_field):
        yield {"text": text}
