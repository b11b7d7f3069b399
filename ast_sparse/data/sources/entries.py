"""What an entry of `data.train` or `data.eval` names: the kind of its text and its files, checked without reading them.

An entry is one source: a path (or glob) of text, JSONL or parquet files, a folder of token shards, or a mapping of
`datasets.load_dataset` arguments.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ast_sparse.data.sources.text_files import COMPRESSED, READABLE, uncompressed_name
from ast_sparse.data.tokens.shards import ShardFolder, is_shard_folder, read_manifest
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.config import DataConfig

Entry = str | Mapping[str, Any]

_JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}
_REFUSED_SUFFIXES = {".arrow", ".bz2", ".csv", ".pdf", ".tar", ".tsv", ".xz", ".zip"}
_FORMATS = {"arrow", "csv", "json", "pandas", "parquet", "sql", "text", "xml"}  # names of readers of `datasets`


class MissingTextError(UserError):
    """A file of text is missing or may not be read."""


def check_sources(config: DataConfig) -> None:
    """Check that every file of `data.train` and `data.eval` is there and of a readable kind, without reading any.

    Raises:
        UserError: a missing or empty file, a glob that matches nothing, an unknown kind of file, a malformed entry,
            shards that are unfinished or cut short, or a source that is in both lists.
    """
    places: dict[str, str] = {}
    trained = config.entries("train")
    _check_kinds(trained, config.root)
    for field, entries in trained.items():
        for key in {key for entry in entries for key in _identities(entry, config.root, field)}:
            if (other := places.setdefault(key, field)) != field:
                raise UserError(f"`{field}`: {key} is in `{other}` too. Give each domain its own text.")
    evaluated = config.entries("eval")
    _check_kinds(evaluated, config.root)
    for field, entries in evaluated.items():
        for entry in entries:
            if found := sorted(places[key] for key in _identities(entry, config.root, field) if key in places):
                raise UserError(
                    f"`{field}`: {entry} is in `{found[0]}` too, so nothing would be held out. Give other text, or "
                    f"remove `{field}` and set `data.eval_share`."
                )


def _check_kinds(entries: Mapping[str, Sequence[Entry]], root: str | None) -> None:
    """Check that all domains are folders of shards, or none."""
    kinds = {field: bool(shard_folders(part, root, field)) for field, part in entries.items()}
    if len(set(kinds.values())) > 1:
        shards, text = (
            next(field for field, is_shards in kinds.items() if is_shards == which) for which in (True, False)
        )
        raise UserError(
            f"`{shards}` is a folder of shards and `{text}` is text. Make shards of all text with ast-data prepare, "
            "or of none."
        )


def check_entries(entries: Sequence[Entry], root: str | None, field: str) -> None:
    """Check sources of text as `check_sources` checks those of `data`."""
    for entry in entries:
        text_files(entry, root, field)


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
            f"`{field}`: {found[0][0]} is a folder of shards and {other} is text. Make shards of all text with "
            "ast-data prepare, or of none."
        )
    return [ShardFolder(name, path, read_manifest(path)) for name, path in found]


def text_files(entry: Entry, root: str | None, field: str) -> tuple[str, list[Path]]:
    """Kind of an entry of text (hub, parquet, json, text) and its files.

    Raises:
        UserError: as `check_sources`, or the entry is a folder of shards.
    """
    kind, files = _check_entry(entry, root, field)
    if kind == "shards":
        raise UserError(f"`{field}`: {entry} is a folder of shards, but text is read here. Give the text itself.")
    return kind, files


def _identities(entry: Entry, root: str | None, field: str) -> set[str]:
    """What tells sources apart: the files of an entry, or the arguments of a data set."""
    kind, files = _check_entry(entry, root, field)
    if kind == "hub":
        return {json.dumps({"split": "train", **cast(Mapping[str, Any], entry)}, sort_keys=True, default=str)}
    return {str(file.resolve()) for file in files}


def source_stamps(entry: Entry, root: str | None, field: str) -> list[Any]:
    """What changes when the text of an entry does: name, size and time of its files, or the arguments of a data set."""
    kind, files = text_files(entry, root, field)
    return [dict(cast(Mapping[str, Any], entry))] if kind == "hub" else file_stamps(files)


def file_stamps(files: list[Path]) -> list[Any]:
    """What changes when a file does: its name, size and time."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _check_entry(entry: Entry, root: str | None, field: str) -> tuple[str, list[Path]]:
    """Kind of the entry (hub, shards, parquet, json, text) and its files; for shards their folder."""
    if isinstance(entry, Mapping):
        if not isinstance(entry.get("path"), str):
            raise UserError(
                f"`{field}`: {dict(entry)!r} names no data set. Give `path`, as for `datasets.load_dataset`."
            )
        if entry["path"] in _FORMATS and not ("data_files" in entry or "data_dir" in entry):
            raise UserError(f"`{field}`: {dict(entry)!r} names a format but no files. Give `data_files`.")
        return "hub", []
    folder = Path(root or ".").expanduser() / Path(entry).expanduser()
    if is_shard_folder(folder):
        read_manifest(folder)
        return "shards", [folder]
    files = _resolve(entry, root, field)
    kinds = {_kind(path) for path in files}
    if len(kinds) > 1:
        raise UserError(
            f"`{field}`: {entry} matches files of several kinds ({', '.join(sorted(kinds))}). Give each its own entry."
        )
    return kinds.pop(), files


def _resolve(entry: str, root: str | None, field: str) -> list[Path]:
    folder = Path(root or ".").expanduser()
    path = folder / Path(entry).expanduser()
    where = f"`data.root` = {folder}" if root else f"the current folder, {Path.cwd()} (`data.root` is not set)"
    if glob.has_magic(entry) and not path.exists():
        files = sorted(match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file())
        if not files:
            raise MissingTextError(
                f"`{field}`: no file matches {entry} under {where}. Correct the pattern or `data.root`."
            )
    elif path.is_dir():
        raise UserError(f"`{field}`: {entry} is a folder under {where}. Name its files, for instance {entry}/*.jsonl.")
    elif not path.is_file():
        raise MissingTextError(
            f"`{field}`: file {entry} does not exist under {where}. Correct the name or `data.root`."
        )
    else:
        files = [path]
    for file in files:
        if not os.access(file, os.R_OK):
            raise MissingTextError(f"`{field}`: {file} cannot be read: permission denied.")
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
