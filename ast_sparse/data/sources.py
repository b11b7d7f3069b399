"""Where text comes from: files and hub data sets to documents.

An entry of `data.train` or `data.eval` is one source: a path (or glob) of text, JSONL or parquet files, or a mapping of
`datasets.load_dataset` arguments. Every source becomes a memory-mapped `datasets.Dataset` with one document a row, or
is read once, document by document, to be written into shards.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from ast_sparse.data.conversations import ROW, chat_columns, chat_columns_of_file, json_conversations, read_row
from ast_sparse.data.files import COMPRESSED, READABLE, file_documents, json_rows, one_line, shown, uncompressed_name
from ast_sparse.data.shards import ShardFolder, is_shard_folder, read_manifest
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.config import DataConfig

Entry = str | Mapping[str, Any]

_FORMAT_VERSION = 1  # part of the cache key of files: raise it when they are read differently
_JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
_REFUSED_SUFFIXES = {".arrow", ".bz2", ".csv", ".pdf", ".tar", ".tsv", ".xz", ".zip"}
_FORMATS = {"arrow", "csv", "json", "pandas", "parquet", "sql", "text", "xml"}  # names of readers of `datasets`


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry: its name for messages, and its documents (`text_field`, one document a row) or conversations."""

    name: str
    documents: Dataset
    text_field: str
    is_chat: bool = False  # rows have the columns of `chat_columns`


def check_sources(config: DataConfig) -> None:
    """Check that every file of `data.train` and `data.eval` is there and of a readable kind, without reading any.

    Raises:
        UserError: a missing or empty file, a glob that matches nothing, an unknown kind of file, a malformed entry,
            shards that are unfinished or cut, or a source that stands in both lists.
    """
    places: dict[str, str] = {}
    trained = config.entries("train")
    _check_kinds(trained, config.root)
    for field, entries in trained.items():
        for key in {key for entry in entries for key in _identities(entry, config.root, field)}:
            if (other := places.setdefault(key, field)) != field:
                raise UserError(f"`{field}`: {key} is in `{other}` too. Give each domain text of its own.")
    evaluated = config.entries("eval")
    _check_kinds(evaluated, config.root)
    for field, entries in evaluated.items():
        for entry in entries:
            if found := sorted(places[key] for key in _identities(entry, config.root, field) if key in places):
                raise UserError(
                    f"`{field}`: {entry} is in `{found[0]}` too, so nothing would be held out. Name other text, or "
                    f"remove `{field}` and set `data.eval_share`."
                )


def _check_kinds(entries: Mapping[str, Sequence[Entry]], root: str | None) -> None:
    """Domains are all of shards, or none is."""
    kinds = {field: bool(shard_folders(part, root, field)) for field, part in entries.items()}
    if len(set(kinds.values())) > 1:
        shards, text = (
            next(field for field, is_shards in kinds.items() if is_shards == which) for which in (True, False)
        )
        raise UserError(
            f"`{shards}` is a folder of shards and `{text}` is text. Make shards of all with ast-data prepare, or of "
            "none."
        )


def check_entries(entries: Sequence[Entry], root: str | None, field: str) -> None:
    """Check single sources of text as `check_sources` does those of `data`."""
    for entry in entries:
        _check_text(entry, root, field)


def shard_folders(entries: Sequence[Entry], root: str | None, field: str) -> list[ShardFolder]:
    """The folders of shards that entries name; none if they are text.

    Raises:
        UserError: a folder is unfinished or damaged, or only some of the entries are folders of shards.
    """
    checked = [(entry, *_check_entry(entry, root, field)) for entry in entries]
    found = [(str(entry), files[0]) for entry, kind, files in checked if kind == "shards"]
    if found and len(found) < len(checked):
        other = next(entry for entry, kind, _ in checked if kind != "shards")
        raise UserError(
            f"`{field}`: {found[0][0]} is a folder of shards and {other} is text. Make shards of all with ast-data "
            "prepare, or of none."
        )
    return [ShardFolder(name, path, read_manifest(path)) for name, path in found]


def _check_text(entry: Entry, root: str | None, field: str) -> tuple[str, list[Path]]:
    kind, files = _check_entry(entry, root, field)
    if kind == "shards":
        raise UserError(f"`{field}`: {entry} is a folder of shards, and here text is read. Name its text.")
    return kind, files


def _identities(entry: Entry, root: str | None, field: str) -> set[str]:
    """What tells sources apart: the files of an entry, or the arguments of a data set."""
    kind, files = _check_entry(entry, root, field)
    if kind == "hub":
        return {json.dumps({"split": "train", **cast(Mapping[str, Any], entry)}, sort_keys=True, default=str)}
    return {str(file.resolve()) for file in files}


def source_stamps(entry: Entry, root: str | None, field: str) -> list[Any]:
    """What changes when the text of an entry does: name, size and time of its files, or the arguments of a data set."""
    kind, files = _check_text(entry, root, field)
    return [dict(cast(Mapping[str, Any], entry))] if kind == "hub" else _stamps(files)


def _stamps(files: list[Path]) -> list[Any]:
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _check_entry(entry: Entry, root: str | None, field: str) -> tuple[str, list[Path]]:
    """Kind of the entry (hub, shards, parquet, json, text) and its files, of shards their folder."""
    if isinstance(entry, Mapping):
        if not isinstance(entry.get("path"), str):
            raise UserError(
                f"`{field}`: {dict(entry)!r} names no data set. Give `path`, as to `datasets.load_dataset`."
            )
        if entry["path"] in _FORMATS and not ("data_files" in entry or "data_dir" in entry):
            raise UserError(f"`{field}`: {dict(entry)!r} names a format and no files. Give `data_files`.")
        return "hub", []
    folder = Path(root or ".").expanduser() / Path(entry).expanduser()
    if is_shard_folder(folder):
        read_manifest(folder)
        return "shards", [folder]
    files = _resolve(entry, root, field)
    kinds = {_kind(path) for path in files}
    if len(kinds) > 1:
        raise UserError(
            f"`{field}`: {entry} matches files of several kinds ({', '.join(sorted(kinds))}). Give each kind an entry."
        )
    return kinds.pop(), files


def _resolve(entry: str, root: str | None, field: str) -> list[Path]:
    folder = Path(root or ".").expanduser()
    path = folder / Path(entry).expanduser()
    where = f"`data.root` = {folder}" if root else f"the current folder, {Path.cwd()} (`data.root` is not set)"
    if glob.has_magic(entry) and not path.exists():
        files = sorted(match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file())
        if not files:
            raise UserError(f"`{field}`: no file matches {entry} under {where}. Correct the pattern or `data.root`.")
    elif path.is_dir():
        raise UserError(f"`{field}`: {entry} is a folder under {where}. Name its files, for instance {entry}/*.jsonl.")
    elif not path.is_file():
        raise UserError(f"`{field}`: file {entry} does not exist under {where}. Correct the name or `data.root`.")
    else:
        files = [path]
    for file in files:
        if not os.access(file, os.R_OK):
            raise UserError(f"`{field}`: {file} cannot be read: permission denied.")
        if not file.stat().st_size:
            raise UserError(f"`{field}`: {file} is empty. Remove it from the list or give it text.")
    return files


def _kind(path: Path) -> str:
    name = uncompressed_name(path)
    suffix = Path(name).suffix
    is_plain = not path.name.lower().endswith(COMPRESSED)
    if suffix in _JSON_SUFFIXES:
        return "json"
    if suffix == ".parquet" and is_plain:
        return "parquet"
    if suffix in _REFUSED_SUFFIXES or suffix == ".parquet":
        raise UserError(f"{path}: files of this kind cannot be read as text. Give {READABLE}.")
    return "text"


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
    checked = [_check_text(entry, root, field) for entry in entries]
    return [_load(entry, kind, files, text_field) for entry, (kind, files) in zip(entries, checked, strict=True)]


def iterate_documents(
    entries: Sequence[Entry], root: str | None, text_field: str, field: str, streaming: bool = False
) -> Iterator[str]:
    """The documents of every entry in order, one at a time: files are read once, nothing is cached.

    Args:
        streaming: read data sets of the hub over the network instead of downloading them; an entry may say so itself.

    Raises:
        UserError: as `load_documents`.
    """
    for entry in entries:
        kind, files = _check_text(entry, root, field)
        if kind in ("json", "text"):
            yield from file_documents(files, kind, text_field)
        elif isinstance(entry, Mapping):
            name = _hub_name(entry)
            rows = _load_hub(entry, name, text_field, bool(entry.get("streaming", streaming)))
            yield from _column_texts(rows, text_field, name)
        else:
            yield from _column_texts(_load_parquet(files, text_field, streaming=True), text_field, cast(str, entry))


def _column_texts(rows: Dataset | IterableDataset, text_field: str, name: str) -> Iterator[str]:
    number = 0
    try:
        for number, row in enumerate(rows):
            if not isinstance(text := row[text_field], str):
                raise UserError(f"{name}: row {number} has no text in `{text_field}` but {shown(text)}. Leave it out.")
            yield text
    except (OSError, ValueError, DatasetGenerationError) as error:  # a damaged file, or the network
        raise UserError(f"{name} cannot be read after row {number}: {one_line(error)} Copy it again.") from error


def read_texts(entry: str, root: str | None, text_field: str, field: str) -> list[str]:
    """The documents of one file or glob, read into memory. Arguments and errors as of `load_documents`."""
    kind, files = _check_text(entry, root, field)
    if kind == "parquet":
        return list(_load_parquet(files, text_field)[text_field])
    return list(file_documents(files, kind, text_field))


def read_conversations(entry: str, root: str | None, field: str) -> list[dict[str, Any]]:
    """The rows of one file or glob of chat data, read into memory; none where it is raw text.

    Raises:
        UserError: as `load_documents`.
    """
    kind, files = _check_text(entry, root, field)
    if not chat_columns_of_file(files[0], kind):
        return []
    return [read_row(row) for row in _load(entry, kind, files, "").documents]


def read_groups(entry: str, root: str | None, text_field: str, by: str, field: str) -> dict[str, list[str]]:
    """The documents of one JSONL or parquet file or glob by the value of a field, in the order they first appear.

    Args:
        by: field, or the path to one inside others: `meta.domain`. Its values are strings, numbers or booleans.

    Raises:
        UserError: as `read_texts`; the file is plain text, or a row has no such field or no such value in it.
    """
    kind, files = _check_text(entry, root, field)
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
            raise UserError(f"{file} has no column `{top}` but {', '.join(names)}. Name one of them.")
    return list(_load_parquet(files, top)[top])


def _group(row: Any, where: str, by: str) -> str:
    value = row
    for name in by.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UserError(f"{where}: no field `{by}` to group by. Name another field, or complete the row.")
        value = value[name]
    if not isinstance(value, str | int | float):
        raise UserError(f"{where}: `{by}` is {shown(value)}, no string or number to group by.")
    return str(value)


def _load(entry: Entry, kind: str, files: list[Path], text_field: str) -> Source:
    if isinstance(entry, Mapping):
        name = _hub_name(entry)
        documents = cast(Dataset, _load_hub(entry, name, text_field, may_be_chat=True))
        is_chat = bool(chat_columns(documents.column_names))
        return Source(name=name, documents=documents, text_field=text_field, is_chat=is_chat)
    columns = chat_columns_of_file(files[0], kind)
    if kind == "parquet":
        documents = cast(Dataset, _load_parquet(files, *(columns or [text_field])))
        return Source(name=entry, documents=documents, text_field=text_field, is_chat=bool(columns))
    if columns:
        return Source(name=entry, documents=_load_chat_files(files, columns), text_field=ROW, is_chat=True)
    return Source(name=entry, documents=_load_files(files, kind, text_field), text_field="text")


def _hub_name(entry: Mapping[str, Any]) -> str:
    return " ".join(str(entry[key]) for key in ("path", "name", "split") if entry.get(key))


def _load_hub(
    entry: Mapping[str, Any], name: str, text_field: str, streaming: bool = False, may_be_chat: bool = False
) -> Dataset | IterableDataset:
    """The text column alone, or the columns of conversations."""
    kind = IterableDataset if streaming else Dataset
    try:
        loaded = datasets.load_dataset(**{"split": "train", **({"streaming": True} if streaming else {}), **entry})
        # features of a stream may be unknown until it is read
        columns = loaded.column_names or list(next(iter(loaded), {})) if isinstance(loaded, kind) else []
    except Exception as error:  # whatever the arguments of the entry make `datasets` and its readers raise
        reason = one_line(error).removesuffix(".")
        raise UserError(f"Cannot load data set {name}: {reason}. Check its entry, or the network.") from error
    if not isinstance(loaded, kind):
        mend = "name one `split`" if streaming else "name one `split`, without `streaming`"
        raise UserError(f"Data set {name} loads as {type(loaded).__name__}: {mend}.")
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
            raise UserError(f"{file} is not a parquet file: {one_line(error)} Copy or write it again.") from error
        for column in columns:
            if column not in names:
                raise UserError(_no_column(str(file), column, names))
    try:
        return cast(
            Dataset | IterableDataset,
            datasets.load_dataset(
                "parquet", data_files=list(map(str, files)), split="train", columns=list(columns), streaming=streaming
            ),
        )
    except DatasetGenerationError as error:
        reason = one_line(error.__cause__ or error)
        raise UserError(f"{', '.join(map(str, files))} is damaged: {reason} Copy or write it again.") from error


def _no_column(name: str, text_field: str, columns: Sequence[str]) -> str:
    return f"{name} has no column `{text_field}` but {', '.join(columns)}. Set `text_field`."


def _load_files(files: list[Path], kind: str, text_field: str) -> Dataset:
    arguments = {"files": tuple(files), "kind": kind, "text_field": text_field}  # a list would mean shards
    return _generated(_rows, "text", arguments, (_FORMAT_VERSION, _stamps(files), kind, text_field))


def _load_chat_files(files: list[Path], columns: list[str]) -> Dataset:
    arguments = {"files": tuple(files), "columns": tuple(columns)}
    return _generated(json_conversations, ROW, arguments, (_FORMAT_VERSION, _stamps(files), ROW, columns))


def _generated(rows: Any, column: str, arguments: dict[str, Any], parts: tuple[Any, ...]) -> Dataset:
    """What a generator of rows of one column of text makes, cached under the hash of `parts`."""
    try:
        return cast(
            Dataset,
            Dataset.from_generator(
                rows,
                features=Features({column: Value("large_string")}),  # a string column ends at 2 GiB
                gen_kwargs=arguments,
                fingerprint=Hasher.hash(parts),
            ),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError | OSError):
            raise error.__cause__ from None
        raise


def _rows(files: tuple[Path, ...], kind: str, text_field: str) -> Iterator[dict[str, str]]:
    for text in file_documents(files, kind, text_field):
        yield {"text": text}
