"""Tokenise batches of documents, in each process of `ast-data prepare`, and write them as a shard.

Nothing heavy is imported here, because every process imports this.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import IO

import numpy as np

from ast_sparse.data.tokens.long_text import Encode, encoded
from ast_sparse.data.tokens.shards import DOCUMENTS, TOKENS, Shard

TEMPORARY = ".tmp"


@dataclass(frozen=True, kw_only=True)
class TokeniserSettings:
    """What a process needs to know.

    Attributes:
        tokenizer: JSON of a fast tokenizer, or a pickled one of another kind.
        token_type: a numpy type.
        begin: tokens before each document.
        splits_special: text that spells a special token is split like any other, which a tokenizer's JSON does not say.
    """

    tokenizer: str | bytes
    eos_token_id: int
    token_type: str
    begin: tuple[int, ...] = ()
    splits_special: bool = False


@dataclass(frozen=True)
class Batch:
    """Some documents as stored in a shard: tokens as bytes, and a token count and hash for each, `[documents]`."""

    tokens: bytes
    lengths: np.ndarray
    keys: np.ndarray
    largest_token: int


class Tokeniser:
    """Tokenises batches of documents; keep one per process."""

    def __init__(self, settings: TokeniserSettings) -> None:
        self._encode = _encoder(settings)
        self._eos = settings.eos_token_id
        self._begin = settings.begin
        self._type = np.dtype(settings.token_type).newbyteorder("<")

    def __call__(self, texts: Sequence[str]) -> Batch:
        """Tokenise documents, with `begin` before and EOS after each; an empty one has no token.

        Raises:
            OverflowError: a token does not fit the type.
        """
        parts = [
            document_tokens(text, ids, self._eos, self._begin)
            for text, ids in zip(texts, encoded(self._encode, texts), strict=True)
        ]
        tokens = np.concatenate(parts)
        largest = int(tokens.max(initial=0))
        if largest > np.iinfo(self._type).max:  # a tokenizer that makes tokens beyond its own length
            raise OverflowError(f"token {largest} does not fit {self._type.name}")
        return Batch(
            tokens=tokens.astype(self._type).tobytes(),
            lengths=np.asarray([len(part) for part in parts], dtype=np.int64),
            keys=np.asarray([text_key(text) for text in texts], dtype="<u8"),
            largest_token=largest,
        )


def write_shard(folder: Path, name: str, batches: Iterable[Batch]) -> Shard:
    """Write `name.tokens` and `name.documents`, each through a temporary file that is renamed when it is complete.

    Raises:
        OSError: the disk is full or cannot be written to; no temporary file is left.
    """
    lengths, keys, largest, checksum = [], [], 0, 0
    with _whole_file(folder / (name + TOKENS)) as stream:
        for batch in batches:
            lengths.append(batch.lengths)
            keys.append(batch.keys)
            largest = max(largest, batch.largest_token)
            checksum = zlib.crc32(batch.tokens, checksum)
            stream.write(batch.tokens)
    counts = np.concatenate(lengths)
    index = np.stack([np.cumsum(counts, dtype="<u8"), np.concatenate(keys)]).tobytes()
    with _whole_file(folder / (name + DOCUMENTS)) as stream:
        stream.write(index)
    return Shard(
        name=name,
        documents=len(counts),
        empty=int(np.count_nonzero(counts == 0)),
        tokens=int(counts.sum()),
        largest_token=largest,
        tokens_crc32=checksum,
        documents_crc32=zlib.crc32(index),
    )


def document_tokens(text: str, ids: np.ndarray, eos: int, begin: tuple[int, ...] = ()) -> np.ndarray:
    """The tokens of a text as a document: `begin`, the tokens, EOS; none for an empty text."""
    if not text.strip():
        return ids[:0]
    return np.concatenate([np.asarray(missing(begin, ids), dtype=ids.dtype), ids, [eos]])


def missing(begin: tuple[int, ...], ids: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """The BOS tokens to put before a text: none if it begins with them already, as a rendered chat may."""
    return () if tuple(ids[: len(begin)]) == begin else begin


def text_key(text: str) -> int:
    """A 64-bit hash of a text, by which documents are held out."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _encoder(settings: TokeniserSettings) -> Encode:
    if isinstance(settings.tokenizer, bytes):
        slow = pickle.loads(settings.tokenizer)  # from the process that started this one
        return lambda texts: slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(settings.tokenizer)
    fast.encode_special_tokens = settings.splits_special
    fast.no_truncation()
    fast.no_padding()
    return lambda texts: [one.ids for one in fast.encode_batch_fast(texts, add_special_tokens=False)]


@contextmanager
def _whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name once it is complete and on disk; a failure leaves nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb", buffering=2**20) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_tokeniser: Tokeniser | None = None


def start_process(settings: TokeniserSettings) -> None:
    """Start a process of the pool. It exits when the one that started it is gone, however that ended."""
    global _tokeniser
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()
    _tokeniser = Tokeniser(settings)


def tokenise(texts: Sequence[str]) -> Batch:
    """`Tokeniser` of this process."""
    assert _tokeniser is not None, "start_process did not run"
    return _tokeniser(texts)
