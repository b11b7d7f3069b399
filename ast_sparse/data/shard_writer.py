"""Tokenise a group of documents and write it as one shard: what each process of `ast-data prepare` does.

Nothing heavy is imported here, because every process imports this.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import IO

import numpy as np

from ast_sparse.data.long_text import Encode, encoded
from ast_sparse.data.shards import DOCUMENTS, TOKENS, Shard

TEMPORARY = ".tmp"


@dataclass(frozen=True, kw_only=True)
class WriterSettings:
    """What a process needs to know.

    Attributes:
        tokenizer: JSON of a fast tokenizer, or a pickled one of another kind.
        token_type: a numpy type.
    """

    folder: str
    tokenizer: str | bytes
    eos_token_id: int
    token_type: str


class ShardWriter:
    """Writes shards of one folder; keep one per process."""

    def __init__(self, settings: WriterSettings) -> None:
        self.settings = settings
        self._encode = _encoder(settings.tokenizer)

    def __call__(self, name: str, texts: Sequence[str]) -> Shard:
        """Write `name.tokens` and `name.documents`, each through a temporary file that is renamed when it is whole.

        Raises:
            OSError: the disk is full or cannot be written to; no temporary file is left.
        """
        dtype = np.dtype(self.settings.token_type).newbyteorder("<")
        lengths, keys, largest, checksum = [], [], 0, 0
        folder = Path(self.settings.folder)
        with _whole_file(folder / (name + TOKENS)) as stream:
            for text, ids in zip(texts, encoded(self._encode, texts), strict=True):
                tokens = np.append(ids, self.settings.eos_token_id) if text.strip() else ids[:0]
                lengths.append(len(tokens))
                keys.append(text_key(text))
                if len(tokens):
                    largest = max(largest, int(tokens.max()))
                    content = _as_type(tokens, dtype).tobytes()
                    checksum = zlib.crc32(content, checksum)
                    stream.write(content)
        index = np.stack([np.cumsum(lengths, dtype="<u8"), np.asarray(keys, dtype="<u8")]).tobytes()
        with _whole_file(folder / (name + DOCUMENTS)) as stream:
            stream.write(index)
        return Shard(
            name=name,
            documents=len(texts),
            empty=lengths.count(0),
            tokens=sum(lengths),
            largest_token=largest,
            tokens_crc32=checksum,
            documents_crc32=zlib.crc32(index),
        )


def text_key(text: str) -> int:
    """A 64-bit hash of a text, by which documents are held out."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _as_type(tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if tokens.max() > np.iinfo(dtype).max:  # a tokenizer that makes tokens beyond its own length
        raise OverflowError(f"token {int(tokens.max())} does not fit {dtype.name}")
    return tokens.astype(dtype)


def _encoder(tokenizer: str | bytes) -> Encode:
    if isinstance(tokenizer, bytes):
        slow = pickle.loads(tokenizer)  # from the process that started this one
        return lambda texts: slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(tokenizer)
    fast.no_truncation()
    fast.no_padding()
    return lambda texts: [one.ids for one in fast.encode_batch_fast(texts, add_special_tokens=False)]


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when it is whole and on the disk; of a failure nothing is left."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb", buffering=2**20) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_writer: ShardWriter | None = None


def start_process(settings: WriterSettings) -> None:
    """Begin a process of the pool: it goes when the one that started it is gone, however that ended."""
    global _writer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()
    _writer = ShardWriter(settings)


def write_shard(name: str, texts: Sequence[str]) -> Shard:
    """`ShardWriter` of this process."""
    assert _writer is not None, "start_process did not run"
    return _writer(name, texts)
