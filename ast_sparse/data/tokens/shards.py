"""Token shards: the format that `ast-data prepare` writes and training reads without copying.

A folder contains

- `manifest.json`: tokenizer, token type, counts, and name, sizes and checksums of every shard;
- `shard-N.tokens`: token ids, little-endian uint16 or uint32, every document ends with one EOS, and begins with BOS if
  the manifest says so;
- `shard-N.documents`: two little-endian uint64 arrays `[documents]`: where each document ends in the shard, and a hash
  of its text. Empty documents have no tokens and are kept.

The manifest is written last, so a folder that has one is complete.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ast_sparse.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "prepare.json"  # the finished shards, until all are written
TOKENS, DOCUMENTS = ".tokens", ".documents"
_TYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_OFFSETS = np.dtype("<u8")
_CHUNK = 2**24  # bytes read at once by a check


@dataclass(frozen=True)
class Shard:
    """One shard: its counts, its largest token, and the CRC-32 of its two files."""

    name: str
    documents: int
    empty: int
    tokens: int
    largest_token: int
    tokens_crc32: int
    documents_crc32: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards contains.

    Attributes:
        tokenizer: name of the tokenizer, for messages.
        tokenizer_key: hash of what decides the tokens of a text, from `tokenise.tokenizer_key`.
        vocab_size: number of tokens of the tokenizer, which decided the token type.
        token_type: uint16 or uint32.
        bos: tokens that every document begins with, except empty ones; none in folders older than this field.
        text_field, sources: what was read.
        text_key: hash of the files (name, size, time) and of how they were cut, by which a later call recognises its
            own work.
    """

    format_version: int
    tokenizer: str
    tokenizer_key: str
    vocab_size: int
    eos_token_id: int
    token_type: str
    text_field: str
    sources: list[str]
    text_key: str
    shards: list[Shard]
    bos: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents of all shards, empty ones included."""
        return sum(shard.documents for shard in self.shards)

    @property
    def empty(self) -> int:
        """Documents without a token."""
        return sum(shard.empty for shard in self.shards)

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens on disk."""
        return _TYPES[self.token_type]

    def to_dict(self) -> dict[str, Any]:
        """The manifest as it is written."""
        return asdict(self)


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards and what messages call it."""

    name: str
    path: Path
    manifest: Manifest


def token_type(vocab_size: int) -> str:
    """The smaller type that fits every token."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def is_shard_folder(folder: Path) -> bool:
    """Whether `ast-data prepare` wrote here, finished or not."""
    return (folder / MANIFEST).is_file() or (folder / PROGRESS).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder, whose files all have the sizes it lists.

    Raises:
        UserError: the folder is unfinished, the manifest is damaged or of a later version, or a shard is missing,
            too short or too long.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PROGRESS).is_file():
            raise UserError(
                f"{folder} is unfinished. Run the same ast-data prepare again: it continues where it stopped."
            )
        raise UserError(f"{folder} is not a folder of shards: it has no {MANIFEST}. Make it with ast-data prepare.")
    manifest = parse_manifest(path)
    if not manifest.shards:
        raise UserError(f"{path} lists no shards. Make the folder again with ast-data prepare.")
    names = [shard.name for shard in manifest.shards]
    if (
        names != [shard_name(number) for number in range(len(names))]
        or (folder / (shard_name(len(names)) + TOKENS)).exists()
    ):
        raise UserError(
            f"{path} does not list the shards of its folder in order. Copy it again, or make the folder again "
            "with ast-data prepare."
        )
    for shard in manifest.shards:
        for suffix, size in file_sizes(manifest, shard).items():
            file = folder / (shard.name + suffix)
            if not file.is_file():
                raise UserError(f"{file} is missing. Copy it again, or make the folder again with ast-data prepare.")
            if (found := file.stat().st_size) != size:
                raise UserError(
                    f"{file} has {found:,} bytes instead of {size:,}. Copy it again, or make the folder again with "
                    "ast-data prepare."
                )
    return manifest


def parse_manifest(path: Path) -> Manifest:
    """Read a manifest; its shards are not looked at."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{path} has format_version {version}, but this version of ast_sparse reads up to {FORMAT_VERSION}. "
                "Update ast_sparse."
            )
        content = {"bos": [], **content}  # older folders have none
        values = {item.name: content[item.name] for item in fields(Manifest)}
        shards = [parse_shard(shard) for shard in values.pop("shards")]
        manifest = Manifest(shards=shards, **values)
        numbers = (manifest.vocab_size, manifest.eos_token_id, *manifest.bos)
        if manifest.token_type not in _TYPES or not all(type(number) is int for number in numbers):
            raise ValueError(manifest.token_type)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read or is damaged. Copy it again, or make it again with ast-data prepare."
        ) from error
    return manifest


def parse_shard(content: Mapping[str, Any]) -> Shard:
    shard = Shard(**content)
    numbers = [value for key, value in asdict(shard).items() if key != "name"]
    if Path(shard.name).name != shard.name or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(shard.name)
    return shard


def file_sizes(manifest: Manifest, shard: Shard) -> dict[str, int]:
    """Bytes of the files of a shard, by suffix."""
    return {
        TOKENS: shard.tokens * manifest.dtype.itemsize,
        DOCUMENTS: 2 * shard.documents * _OFFSETS.itemsize,
    }


def open_tokens(folder: Path, manifest: Manifest, shard: Shard) -> np.ndarray:
    """The tokens of a shard, memory-mapped `[tokens]`."""
    path = folder / (shard.name + TOKENS)
    if not shard.tokens:
        return np.empty(0, dtype=manifest.dtype)
    return np.memmap(path, dtype=manifest.dtype, mode="r", shape=(shard.tokens,))


def open_documents(folder: Path, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents of a shard end in it, and hashes of their texts: memory-mapped uint64 `[documents]` each."""
    if not shard.documents:
        return np.empty(0, dtype=_OFFSETS), np.empty(0, dtype=_OFFSETS)
    both = np.memmap(folder / (shard.name + DOCUMENTS), dtype=_OFFSETS, mode="r", shape=(2, shard.documents))
    return both[0], both[1]


def verify_shards(folder: Path, progress: Callable[[int], object] = lambda size: None) -> Manifest:
    """Read every byte and compare it with the manifest: checksums, borders of documents, tokens, EOS.

    Args:
        progress: called with the number of bytes of each chunk that was read.

    Raises:
        UserError: as `read_manifest`, or a shard differs from its manifest.
    """
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        for suffix, expected in ((TOKENS, shard.tokens_crc32), (DOCUMENTS, shard.documents_crc32)):
            file = folder / (shard.name + suffix)
            if file_crc32(file, progress) != expected:
                raise UserError(
                    f"{file} is damaged: its checksum differs from the manifest. Copy it again, or make the folder "
                    "again with ast-data prepare."
                )
        ends = open_documents(folder, shard)[0].astype(np.int64)
        lengths = np.diff(ends, prepend=0)
        is_whole = int(ends[-1] if len(ends) else 0) == shard.tokens and not (lengths < 0).any()
        tokens, full = open_tokens(folder, manifest, shard), lengths > 0
        last = tokens[ends[full] - 1] if is_whole else ends
        first = (ends - lengths)[full]
        has_other_begins = is_whole and (
            (lengths[full] <= len(manifest.bos)).any()
            or any((tokens[first + i] != bos).any() for i, bos in enumerate(manifest.bos))
        )
        if not is_whole or has_other_begins or (last != manifest.eos_token_id).any():
            raise UserError(f"{folder / shard.name} does not have the documents its manifest lists. Make it again.")
    return manifest


def file_crc32(file: Path, progress: Callable[[int], object] = lambda size: None) -> int:
    """CRC-32 of a file, read in chunks."""
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
            progress(len(chunk))
    return checksum
