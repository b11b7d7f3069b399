"""A checksum of every tensor, in `checksums.json` beside the weights, so that damage is found on reading.

`{"format_version": 1, "algorithm": "crc32", "tensors": {NAME: CRC}}`: eight hexadecimal digits of zlib's CRC-32 over
the text `DTYPE SHAPE` (`F32 [32, 48]`) and the bytes of the tensor. A folder without the file is read unchecked.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ast_sparse.errors import UserError, shown
from ast_sparse.storage.files import read_json, tensor_shapes, weight_files, write_json

CHECKSUMS_NAME = "checksums.json"

_FORMAT_VERSION = 1
_ALGORITHM = "crc32"
_CHUNK = 2**20


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Bytes of a file with a known CRC-32, so that each of several processes can check its share of a folder.

    Attributes:
        file: inside the folder.
        begin, end: the bytes; `end=None` for the rest of the file.
        crc: as eight hexadecimal digits.
        seed: the CRC-32 of what comes before them.
        fault: what to say if they have another checksum.
        size: their number, or about.
        owner: the process that should check them, because it reads them anyway; modulo the number of processes.
        everywhere: every process checks them, because every one reads them.
    """

    file: str
    begin: int = 0
    end: int | None = None
    crc: str
    seed: int = 0
    fault: str
    size: int
    owner: int | None = None
    everywhere: bool = False


def shares(stretches: Sequence[Stretch], ranks: int) -> list[list[Stretch]]:
    """Divide stretches among processes, with about as many bytes for each."""
    parts = [[each for each in stretches if each.everywhere] for _ in range(ranks)]
    load = [0] * ranks
    apart = [each for each in stretches if not each.everywhere]
    for stretch in sorted(apart, key=lambda each: (each.owner is None, -each.size)):
        rank = load.index(min(load)) if stretch.owner is None else stretch.owner % ranks
        parts[rank].append(stretch)
        load[rank] += stretch.size
    return parts


def stretch_faults(folder: Path, stretches: Iterable[Stretch]) -> list[str]:
    """What is wrong with the stretches: files that are missing, or have other bytes. Unchanged ones are read once."""
    found = []
    for each in stretches:
        try:
            if _sum_of(folder / each.file, _stamp(folder / each.file), each.begin, each.end, each.seed) != each.crc:
                found.append(each.fault)
        except FileNotFoundError:
            found.append(f"{each.file} is missing")
        except OSError as error:
            found.append(f"{each.file} cannot be read: {error.strerror}")
    return list(dict.fromkeys(found))


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
    """Compare safetensors files with the checksums beside them, if there are any.

    Raises:
        UserError: a tensor differs, is missing or was added; or the checksums or a header cannot be read.
    """
    if found := stretch_faults(folder, tensor_stretches(folder, files)):
        raise UserError(f"{found[0]}.")


def tensor_stretches(folder: Path, files: Iterable[Path]) -> list[Stretch]:
    """What `check_checksums` compares: the bytes of each tensor. Errors as there, for tensors missing or added."""
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return []
    expected = _read(path)
    fix = f"Copy or write the folder again; if the weights were changed on purpose, remove {CHECKSUMS_NAME}."
    found: dict[str, Stretch] = {}
    for file in files:
        tensor_shapes(file)  # checks the header: transformers loads a file before we have looked at it
        for name, (begin, end, seed) in _places(file).items():
            if name not in expected:
                raise UserError(f"`{file}` holds `{name}`, which {CHECKSUMS_NAME} does not list. {fix}")
            fault = f"`{file}` is damaged: `{name}` does not have the checksum it was written with. {fix.rstrip('.')}"
            inside = str(file.relative_to(folder))
            found[name] = Stretch(
                file=inside, begin=begin, end=end, crc=expected[name], seed=seed, fault=fault, size=end - begin
            )
    if missing := sorted(expected.keys() - found.keys()):
        raise UserError(f"`{folder}` lacks the tensor {shown(missing[0])} that {CHECKSUMS_NAME} lists. {fix}")
    return list(found.values())


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
    places = _places(file)
    try:
        stamp = _stamp(file)
        return {name: _sum_of(file, stamp, begin, end, seed) for name, (begin, end, seed) in places.items()}
    except OSError as error:
        raise _unreadable(file, error) from error


def _places(file: Path) -> dict[str, tuple[int, int, int]]:
    """First and last byte of each tensor of a safetensors file, and the CRC-32 of its dtype and shape."""
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length))
    except OSError as error:
        raise _unreadable(file, error) from error
    header.pop("__metadata__", None)
    start, places = 8 + length, {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        seed = zlib.crc32(f"{entry['dtype']} {entry['shape']}".encode())
        places[name] = (start + begin, start + end, seed)
    return places


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"`{file}` cannot be read: {error.strerror}. Copy or write the checkpoint again.")


def file_sum(file: Path) -> str:
    """The CRC-32 of a whole file; an unchanged one is read once."""
    return _sum_of(file, _stamp(file), 0, None, 0)


def _stamp(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=2**15)
def _sum_of(file: Path, stamp: tuple[int, ...], begin: int, end: int | None, seed: int) -> str:
    """Cached, because a resume asks several times about gigabytes that have not changed."""
    crc, left = seed, (stamp[1] if end is None else end) - begin
    buffer = memoryview(bytearray(_CHUNK))
    with file.open("rb") as stream:
        stream.seek(begin, os.SEEK_SET)
        while left > 0 and (read := stream.readinto(buffer[: min(left, _CHUNK)])):
            crc = zlib.crc32(buffer[:read], crc)
            left -= read
    return f"{crc:08x}"
