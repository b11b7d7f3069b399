"""A checksum of every tensor, in `checksums.json` beside the weights, so that damage is found on reading.

`{"format_version": 1, "algorithm": "crc32", "tensors": {NAME: CRC}}`: eight hexadecimal digits of zlib's CRC-32 over
the text `DTYPE SHAPE` (`F32 [32, 48]`) and the bytes of the tensor. A folder without the file is read unchecked.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from ast_sparse.errors import UserError, shown
from ast_sparse.storage.files import read_json, weight_files, write_json

CHECKSUMS_NAME = "checksums.json"

_FORMAT_VERSION = 1
_ALGORITHM = "crc32"
_CHUNK = 2**20


def write_checksums(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Write the checksums of a folder's weights.

    Args:
        files: the safetensors files; default: the weight files of a model.
    """
    sums = {name: crc for file in files or weight_files(folder) for name, crc in _tensor_sums(file).items()}
    content = {"format_version": _FORMAT_VERSION, "algorithm": _ALGORITHM, "tensors": sums}
    write_json(folder / CHECKSUMS_NAME, content)


def remove_checksums(folder: Path) -> None:
    """Remove the checksums before other weights are written, which would not match them."""
    (folder / CHECKSUMS_NAME).unlink(missing_ok=True)


def check_checksums(folder: Path, files: Iterable[Path]) -> None:
    """Compare safetensors files, whose headers are intact, with the checksums beside them, if there are any.

    Raises:
        UserError: a tensor differs, is missing or was added; or the checksums cannot be read.
    """
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return
    expected = _read(path)
    fix = f"Copy or write the folder again; if the weights were changed on purpose, remove {CHECKSUMS_NAME}."
    found: set[str] = set()
    for file in files:
        for name, crc in _tensor_sums(file).items():
            if name not in expected:
                raise UserError(f"`{file}` holds `{name}`, which {CHECKSUMS_NAME} does not list. {fix}")
            if crc != expected[name]:
                raise UserError(f"`{file}` is damaged: `{name}` does not have the checksum it was written with. {fix}")
            found.add(name)
    if missing := sorted(expected.keys() - found):
        raise UserError(f"`{folder}` lacks the tensor {shown(missing[0])} that {CHECKSUMS_NAME} lists. {fix}")


def _read(path: Path) -> dict[str, str]:
    content = read_json(path)
    version, tensors = content.get("format_version"), content.get("tensors")
    if isinstance(version, int) and version > _FORMAT_VERSION:
        raise UserError(
            f"`{path}` has format_version {shown(version)}, newer than {_FORMAT_VERSION}. Update ast_sparse."
        )
    if version != _FORMAT_VERSION or content.get("algorithm") != _ALGORITHM or not isinstance(tensors, dict):
        raise UserError(f"`{path}` holds no checksums. Restore the file, or remove it to read without the check.")
    return tensors


def _tensor_sums(file: Path) -> dict[str, str]:
    try:
        stat = file.stat()
        return _sums_of(file, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    except OSError as error:
        raise UserError(f"`{file}` cannot be read: {error.strerror}. Copy or write the checkpoint again.") from error


@lru_cache(maxsize=256)
def _sums_of(file: Path, stamp: tuple[int, ...]) -> dict[str, str]:
    """Checksums by tensor; cached, because a resume asks several times about gigabytes that have not changed."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start, sums = 8 + length, {}
        buffer = memoryview(bytearray(_CHUNK))
        for name, entry in header.items():
            crc = zlib.crc32(f"{entry['dtype']} {entry['shape']}".encode())
            begin, end = entry["data_offsets"]
            stream.seek(start + begin, os.SEEK_SET)
            for left in range(end - begin, 0, -_CHUNK):
                read = stream.readinto(buffer[: min(left, _CHUNK)])
                crc = zlib.crc32(buffer[:read], crc)
            sums[name] = f"{crc:08x}"
    return sums
