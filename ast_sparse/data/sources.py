"""Where text comes from: files and hub data sets to documents.

An entry of `data.train` or `data.eval` is one source: a path (or glob) of text, JSONL or parquet files, or a mapping of
`datasets.load_dataset` arguments. Every source becomes a memory-mapped `datasets.Dataset` with one document a row.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import datasets
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.config import DataConfig

Entry = str | Mapping[str, Any]

_FORMAT_VERSION = 1  # part of the cache key of files: raise it when they are read differently
_JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
_REFUSED_SUFFIXES = {".arrow", ".bz2", ".csv", ".pdf", ".tar", ".tsv", ".xz", ".zip", ".zst"}
_FORMATS = {"arrow", "csv", "json", "pandas", "parquet", "sql", "text", "xml"}  # names of readers of `datasets`
_LONGEST_SHOWN = 40  # characters of a value or name that are shown
_MOST_LISTED = 20  # names
_LONGEST_REASON = 300  # characters of another library's error that are shown
_LARGEST_TEXT_FILE = 2**30  # a text file is one document and is tokenised in one go
_LONGEST_LINE = 2**28  # bytes of a JSONL line, which is one document


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry: its name for messages, and its documents (`text_field`, one document a row)."""

    name: str
    documents: Dataset
    text_field: str


def check_sources(config: DataConfig) -> None:
    """Check that every file of `data.train` and `data.eval` is there and of a readable kind, without reading any.

    Raises:
        UserError: a missing or empty file, a glob that matches nothing, an unknown kind of file, a malformed entry, or
            a source that stands in both lists.
    """
    trained = {key for entry in config.train for key in _identities(entry, config.root, "data.train")}
    for entry in config.eval or ():
        if trained & _identities(entry, config.root, "data.eval"):
            raise UserError(
                f"`data.eval`: {entry} is in `data.train` too, so nothing would be held out. Name other text, or "
                "remove `data.eval` and set `data.eval_share`."
            )


def check_entries(entries: Sequence[Entry], root: str | None, field: str) -> None:
    """Check single sources as `check_sources` does those of `data`."""
    for entry in entries:
        _check_entry(entry, root, field)


def _identities(entry: Entry, root: str | None, field: str) -> set[str]:
    """What tells sources apart: the files of an entry, or the arguments of a data set."""
    kind, files = _check_entry(entry, root, field)
    if kind == "hub":
        return {json.dumps({"split": "train", **cast(Mapping[str, Any], entry)}, sort_keys=True, default=str)}
    return {str(file.resolve()) for file in files}


def _check_entry(entry: Entry, root: str | None, field: str) -> tuple[str, list[Path]]:
    """Kind of the entry (hub, parquet, json, text) and its files."""
    if isinstance(entry, Mapping):
        if not isinstance(entry.get("path"), str):
            raise UserError(
                f"`{field}`: {dict(entry)!r} names no data set. Give `path`, as to `datasets.load_dataset`."
            )
        if entry["path"] in _FORMATS and not ("data_files" in entry or "data_dir" in entry):
            raise UserError(f"`{field}`: {dict(entry)!r} names a format and no files. Give `data_files`.")
        return "hub", []
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
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in _JSON_SUFFIXES:
        return "json"
    if suffix == ".parquet" and name.endswith(suffix):
        return "parquet"
    if suffix in _REFUSED_SUFFIXES or suffix == ".parquet":
        raise UserError(f"{path}: files of this kind cannot be read as text. Give text, .jsonl, .jsonl.gz or .parquet.")
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
    checked = [_check_entry(entry, root, field) for entry in entries]
    return [_load(entry, kind, files, text_field) for entry, (kind, files) in zip(entries, checked, strict=True)]


def read_texts(entry: str, root: str | None, text_field: str, field: str) -> list[str]:
    """The documents of one file or glob, read into memory. Arguments and errors as of `load_documents`."""
    kind, files = _check_entry(entry, root, field)
    if kind == "parquet":
        return list(_load_parquet(files, text_field)[text_field])
    return [row["text"] for row in _documents(tuple(files), kind, text_field)]


def read_groups(entry: str, root: str | None, text_field: str, by: str, field: str) -> dict[str, list[str]]:
    """The documents of one JSONL or parquet file or glob by the value of a field, in the order they first appear.

    Args:
        by: field, or the path to one inside others: `meta.domain`. Its values are strings, numbers or booleans.

    Raises:
        UserError: as `read_texts`; the file is plain text, or a row has no such field or no such value in it.
    """
    kind, files = _check_entry(entry, root, field)
    if kind == "text":
        raise UserError(f"{entry} is plain text, which has no fields to group by. Give .jsonl, .jsonl.gz or .parquet.")
    texts = read_texts(entry, root, text_field, field)
    if kind == "json":
        values = [_group(row, where, by) for file in files for row, where in _json_rows(file)]
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
        raise UserError(f"{where}: `{by}` is {_shown(value)}, no string or number to group by.")
    return str(value)


def _load(entry: Entry, kind: str, files: list[Path], text_field: str) -> Source:
    if isinstance(entry, Mapping):
        name = " ".join(str(entry[key]) for key in ("path", "name", "split") if entry.get(key))
        return Source(name=name, documents=_load_hub(entry, name, text_field), text_field=text_field)
    if kind == "parquet":
        return Source(name=entry, documents=_load_parquet(files, text_field), text_field=text_field)
    return Source(name=entry, documents=_load_files(files, kind, text_field), text_field="text")


def _load_hub(entry: Mapping[str, Any], name: str, text_field: str) -> Dataset:
    try:
        loaded = datasets.load_dataset(**{"split": "train", **entry})
    except Exception as error:  # whatever the arguments of the entry make `datasets` and its readers raise
        reason = _one_line(error).removesuffix(".")
        raise UserError(f"Cannot load data set {name}: {reason}. Check its entry, or the network.") from error
    if not isinstance(loaded, Dataset):
        raise UserError(f"Data set {name} loads as {type(loaded).__name__}: name one `split`, without `streaming`.")
    if text_field not in loaded.column_names:
        raise UserError(_no_column(name, text_field, loaded.column_names))
    return loaded.select_columns([text_field])


def _load_parquet(files: list[Path], text_field: str) -> Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            names = pq.read_schema(file).names
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file} is not a parquet file: {_one_line(error)} Copy or write it again.") from error
        if text_field not in names:
            raise UserError(_no_column(str(file), text_field, names))
    try:
        return cast(
            Dataset,
            datasets.load_dataset("parquet", data_files=list(map(str, files)), split="train", columns=[text_field]),
        )
    except DatasetGenerationError as error:
        reason = _one_line(error.__cause__ or error)
        raise UserError(f"{', '.join(map(str, files))} is damaged: {reason} Copy or write it again.") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _no_column(name: str, text_field: str, columns: Sequence[str]) -> str:
    return f"{name} has no column `{text_field}` but {', '.join(columns)}. Set `text_field`."


def _load_files(files: list[Path], kind: str, text_field: str) -> Dataset:
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    try:
        return cast(
            Dataset,
            Dataset.from_generator(
                _documents,
                features=Features({"text": Value("large_string")}),  # a string column ends at 2 GiB
                gen_kwargs={"files": tuple(files), "kind": kind, "text_field": text_field},  # a list would mean shards
                fingerprint=Hasher.hash((_FORMAT_VERSION, stamps, kind, text_field)),
            ),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError | OSError):
            raise error.__cause__ from None
        raise


def _documents(files: tuple[Path, ...], kind: str, text_field: str) -> Iterator[dict[str, str]]:
    for file in files:
        is_empty = True
        try:
            for text in _json_texts(file, text_field) if kind == "json" else [_text(file)]:
                is_empty = is_empty and not text.strip()
                yield {"text": text}
        except (OSError, EOFError, zlib.error) as error:  # a damaged .gz among them
            raise UserError(f"{file} cannot be read: {_one_line(error)} Copy it again, or mend its rights.") from error
        if is_empty:
            raise UserError(f"{file} holds no text. Remove it from the list or give it text.")


def _open(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.suffix.lower() == ".gz" else file.open("rb")


def _text(file: Path) -> str:
    with _open(file) as stream:
        data = stream.read(_LARGEST_TEXT_FILE + 1)
    if len(data) > _LARGEST_TEXT_FILE:
        raise UserError(f"{file} is larger than 1 GiB, and a text file is one document. Write its documents as JSONL.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(file, data[: error.start].count(b"\n") + 1, error)) from error
    if "\0" in text:
        raise UserError(f"{file} is not text: it holds zero bytes. Give text, .jsonl, .jsonl.gz or .parquet.")
    return text


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> str:
    byte = cast(bytes, error.object)[error.start]
    return f"{file}, line {line}: not UTF-8 (byte 0x{byte:02x}, {error.reason}). Convert the file to UTF-8."


def _json_texts(file: Path, text_field: str) -> Iterator[str]:
    for row, where in _json_rows(file):
        yield _json_text(row, where, text_field)


def _json_rows(file: Path) -> Iterator[tuple[Any, str]]:
    """Rows of a JSONL file or a JSON array, and where each stands, for messages."""
    if file.name.lower().removesuffix(".gz").endswith(".json"):
        with _open(file) as stream:
            if stream.read(64).lstrip().startswith(b"["):
                yield from _json_array_rows(file)
                return
    with _open(file) as stream:
        lines = iter(lambda: stream.readline(_LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > _LONGEST_LINE:
                raise UserError(f"{file}, line {number}: longer than 256 MiB. Split the document, or leave it out.")
            if not line.isspace():
                yield _parse(file, number, line), f"{file}, line {number}"


def _json_array_rows(file: Path) -> Iterator[tuple[Any, str]]:
    with _open(file) as stream:
        data = stream.read(_LARGEST_TEXT_FILE + 1)
    if len(data) > _LARGEST_TEXT_FILE:
        raise UserError(f"{file} is larger than 1 GiB, and an array is read in one go. Write its elements as JSONL.")
    rows = _parse(file, 1, data)
    for number, row in enumerate(rows, start=1):
        yield row, f"{file}, element {number}"


def _parse(file: Path, number: int, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig").rstrip())  # else a cut line is reported as the one after it
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(file, number + data[: error.start].count(b"\n"), error)) from error
    except RecursionError:
        raise UserError(f"{file}, line {number}: nested too deeply to be read. Leave the line out.") from None
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise UserError(f"{file}, line {line}: not JSON ({error.msg}). Each line must be one JSON object.") from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{file}, line {number}: not JSON ({_one_line(error)}) Leave the line out.") from error


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, default=str)[:_LONGEST_SHOWN]
    except RecursionError:
        return "a deeply nested value"


def _listed(names: Iterable[str]) -> str:
    """The first names, each on one line and of bearable length."""
    first = [name if name.isprintable() else repr(name) for name in islice(names, _MOST_LISTED)]
    return ", ".join(name[:_LONGEST_SHOWN] for name in first) or "none"


def _json_text(row: Any, where: str, text_field: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {_shown(row)}. Each line must be one JSON object.")
    if text_field not in row:
        raise UserError(f"{where}: no field `{text_field}` but {_listed(row)}. Set `text_field`.")
    text = row[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field `{text_field}` is not a string but {_shown(text)}. Leave the line out.")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where}: field `{text_field}` holds half a character (a lone surrogate). Leave the line out.")
    return text
