"""The documents of text and JSONL files, plain or compressed, and the errors for those that cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from ast_sparse.errors import UserError, one_line

COMPRESSED = (".gz", ".zst")
READABLE = "text, .jsonl, .jsonl.gz, .jsonl.zst or .parquet"
_LONGEST_SHOWN = 40  # characters of a value or name that are shown
_MOST_LISTED = 20  # names
_LARGEST_TEXT_FILE = 2**30  # a text file is one document and is tokenised in one go
_LONGEST_LINE = 2**28  # bytes of a JSONL line, which is one document


def file_documents(files: Iterable[Path], kind: str, text_field: str) -> Iterator[tuple[str, str]]:
    """The documents of files in order, each with its place: a text file is one, a JSONL line is one (`text_field`).

    Args:
        kind: of the files, `json` or `text`.

    Raises:
        UserError: a file cannot be read or has no text, or a line has no text in `text_field`.
    """
    for file in files:
        is_empty = True
        try:
            for text, where in _json_texts(file, text_field) if kind == "json" else [(_text(file), str(file))]:
                is_empty = is_empty and not text.strip()
                yield text, where
        except (OSError, EOFError, zlib.error) as error:  # including a damaged .gz or .zst
            reason = one_line(error, 300, end="stop")
            raise UserError(f"{file} cannot be read: {reason} Copy it again, or fix its permissions.") from error
        if is_empty:
            raise UserError(f"{file} has no text. Remove it from the list or give it text.")


def uncompressed_name(path: Path) -> str:
    """Name of the file in lower case, without a compression suffix."""
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)


def _open(file: Path) -> IO[bytes]:
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(file))
    return _open_zstd(file) if suffix == ".zst" else file.open("rb")


def _open_zstd(file: Path) -> IO[bytes]:
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        raise UserError(
            f"{file} is compressed with Zstandard, which this build of pyarrow lacks. Install pyarrow from PyPI, or "
            "write the file as .gz."
        )
    with file.open("rb"):  # raises the usual error if the file cannot be read
        pass
    return cast(IO[bytes], io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"), 2**20))


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
        raise UserError(f"{file} is not text: it contains NUL bytes. Give {READABLE}.")
    return text


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> str:
    byte = cast(bytes, error.object)[error.start]
    return f"{file}, line {line}: not UTF-8 (byte 0x{byte:02x}, {error.reason}). Convert the file to UTF-8."


def _json_texts(file: Path, text_field: str) -> Iterator[tuple[str, str]]:
    for row, where in json_rows(file):
        yield _json_text(row, where, text_field), where


def json_rows(file: Path) -> Iterator[tuple[Any, str]]:
    """Rows of a JSONL file or a JSON array, each with its place, for messages."""
    if uncompressed_name(file).endswith(".json"):
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
        return json.loads(data.decode("utf-8-sig").rstrip())  # otherwise a cut line is reported as the next one
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(file, number + data[: error.start].count(b"\n"), error)) from error
    except RecursionError:
        raise UserError(f"{file}, line {number}: nested too deeply to be read. Leave the line out.") from None
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise UserError(f"{file}, line {line}: not JSON ({error.msg}). Each line must be one JSON object.") from error
    except ValueError as error:  # an integer of thousands of digits
        reason = one_line(error, 300, end="stop")
        raise UserError(f"{file}, line {number}: not JSON ({reason}) Leave the line out.") from error


def shown(value: Any) -> str:
    try:
        return json.dumps(value, default=str)[:_LONGEST_SHOWN]
    except RecursionError:
        return "a deeply nested value"


def _listed(names: Iterable[str]) -> str:
    """The first names, each cut short and on one line."""
    first = [name if name.isprintable() else repr(name) for name in islice(names, _MOST_LISTED)]
    return ", ".join(name[:_LONGEST_SHOWN] for name in first) or "none"


def name_text(names: Collection[str]) -> str:
    """What to do if rows with these fields have no text."""
    if "messages" in names or {"prompt", "completion"} <= set(names):
        return (
            "This is chat data, but raw text is read here: put it in `data.train` without streaming, or give it to "
            "ast-eval without --by."
        )
    if "conversations" in names:
        return (
            "Chat data is recognised by `messages`, with `role` and `content`: rename `conversations`, `from`, `value`."
        )
    return "Set `text_field`."


def _json_text(row: Any, where: str, text_field: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {shown(row)}. Each line must be one JSON object.")
    if text_field not in row:
        raise UserError(f"{where}: no field `{text_field}`, only {_listed(row)}. {name_text(row)}")
    text = row[text_field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field `{text_field}` is not a string but {shown(text)}. Leave the line out.")
    check_characters(text, f"{where}: field `{text_field}`")
    return text


def check_characters(text: str, where: str) -> None:
    """Raise UserError if a text cannot be written as UTF-8."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{where} contains half a character (a lone surrogate). Leave the line out.")
