"""Text to token shards: read once, tokenised by several processes, resumed if killed.

One process reads the documents in order and writes the shards. The others tokenise batches, which come back in order,
so the shards do not depend on how many processes there are. At most `_AHEAD` batches for each are in memory.
`prepare.json` lists the finished shards. A run that was killed reads the text again, skips what these contain, and
continues.
"""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ast_sparse.data.sources.documents import iterate_documents
from ast_sparse.data.sources.entries import Entry, source_stamps
from ast_sparse.data.tokens.bos import find_bos
from ast_sparse.data.tokens.shard_writer import (
    TEMPORARY,
    Batch,
    Tokeniser,
    TokeniserSettings,
    start_process,
    tokenise,
    write_shard,
)
from ast_sparse.data.tokens.shards import (
    FORMAT_VERSION,
    MANIFEST,
    PROGRESS,
    Manifest,
    Shard,
    file_sizes,
    parse_manifest,
    read_manifest,
    shard_name,
    token_type,
)
from ast_sparse.data.tokens.tokenise import eos_token, tokenizer_key
from ast_sparse.errors import UserError
from ast_sparse.storage.files import write_json

SHARD_CHARACTERS = 64_000_000
_BATCH_CHARACTERS = 250_000  # of documents that go to a process together; about 50 ms of its time
_AHEAD = 4  # batches for each process that are read but not yet written


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What to tokenise, and how.

    Attributes:
        entries, root, text_field: as in `data.train`.
        shard_characters: a shard takes whole documents up to this many characters.
        keep_long: give a longer document its own shard instead of refusing it.
        workers: processes that tokenise; with 1 the process that reads does it.
        streaming: read hub data sets over the network instead of downloading them.
        bos: as in `data.bos`. With `block` documents are written without BOS; blocks get it in training.
    """

    entries: Sequence[Entry]
    root: str | None = None
    text_field: str = "text"
    shard_characters: int = SHARD_CHARACTERS
    keep_long: bool = False
    workers: int = 1
    streaming: bool = False
    bos: str = "auto"


def prepare_shards(
    folder: Path,
    settings: PrepareSettings,
    tokenizer: PreTrainedTokenizerBase,
    overwrite: bool = False,
    finished: Callable[[Shard, bool], object] = lambda shard, is_new: None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Manifest:
    """Tokenise the text into `folder`, or finish what an earlier call began; a complete folder is left as it is.

    Args:
        finished: called with every shard, and whether this call made it.
        progress: called with the number of tokens of each batch.

    Raises:
        UserError: the text cannot be read, a document is longer than a shard, the folder has other files or shards of
            other text, settings or another tokenizer, or the disk is full. Finished shards stay, and no manifest is
            written.
    """
    manifest = _empty_manifest(settings, tokenizer)
    _check_folder(folder)
    if overwrite:
        _remove_shards(folder)
    if (folder / MANIFEST).is_file():
        _check_same(manifest, parse_manifest(folder / MANIFEST), folder)
        return read_manifest(folder)
    done = _read_progress(folder, manifest)
    for shard in done.values():
        finished(shard, False)
    with _made(folder):
        for leftover in folder.glob(f".*{TEMPORARY}"):
            leftover.unlink()
        for shard in _write_all(folder, settings, tokenizer, manifest, done, progress):
            done[shard.name] = shard
            write_json(folder / PROGRESS, _with_shards(manifest, done).to_dict(), durable=True)
            finished(shard, True)
        manifest = _with_shards(manifest, done)
        if not manifest.tokens:
            raise UserError(f"{', '.join(manifest.sources)} has no text. Give other text.")
        write_json(folder / MANIFEST, manifest.to_dict(), durable=True)
        (folder / PROGRESS).unlink(missing_ok=True)
    return manifest


def _empty_manifest(settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase) -> Manifest:
    stamps = [source_stamps(entry, settings.root, "SOURCE") for entry in settings.entries]
    names = [entry if isinstance(entry, str) else json.dumps(entry, default=str) for entry in settings.entries]
    key = json.dumps([stamps, settings.shard_characters], default=str)
    return Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=str(tokenizer.name_or_path),
        tokenizer_key=tokenizer_key(tokenizer),
        vocab_size=len(tokenizer),
        eos_token_id=eos_token(tokenizer),
        token_type=token_type(len(tokenizer)),
        text_field=settings.text_field,
        sources=names,
        text_key=hashlib.sha256(key.encode()).hexdigest()[:32],
        shards=[],
        bos=list(find_bos(settings.bos, tokenizer, "--bos").of_document),
    )


def _with_shards(manifest: Manifest, done: Mapping[str, Shard]) -> Manifest:
    return Manifest(**{**vars(manifest), "shards": [done[name] for name in sorted(done)]})


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file. Name a folder for the shards.")
    if folder.is_dir():
        names = {path.name for path in folder.iterdir() if not path.name.endswith(TEMPORARY)}
        if names and not names & {MANIFEST, PROGRESS}:
            raise UserError(f"{folder} already has other files. Name an empty or new folder.")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder. If the work fails with nothing in it, it is removed again; disk errors are explained."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        if isinstance(error, OSError):
            raise _write_error(folder, error) from error
        raise


def _remove_shards(folder: Path) -> None:
    """The manifest goes first, so that a half-removed folder is not read."""
    for name in (MANIFEST, PROGRESS):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("shard-*"):
        path.unlink()


def _check_same(ours: Manifest, theirs: Manifest, folder: Path) -> None:
    for key, what in (
        ("tokenizer_key", "another tokenizer"),
        ("eos_token_id", "another end-of-sequence token"),
        ("bos", "another setting of --bos"),
        ("text_field", "another text field"),
        ("text_key", "other text, text that changed since, or another shard size"),
    ):
        if getattr(ours, key) != getattr(theirs, key):
            raise UserError(f"{folder} has shards made with {what}. Name another folder, or add --overwrite.")


def _read_progress(folder: Path, manifest: Manifest) -> dict[str, Shard]:
    """Shards that an earlier call finished and that are still there."""
    if not (folder / PROGRESS).is_file():
        return {}
    earlier = parse_manifest(folder / PROGRESS)
    _check_same(manifest, earlier, folder)
    return {
        shard.name: shard
        for shard in earlier.shards
        if all(
            (path := folder / (shard.name + suffix)).is_file() and path.stat().st_size == size
            for suffix, size in file_sizes(earlier, shard).items()
        )
    }


def _write_all(
    folder: Path,
    settings: PrepareSettings,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    done: Mapping[str, Shard],
    progress: Callable[[int], object],
) -> Iterator[Shard]:
    """Make every shard that is not done, one after the other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokeniser = TokeniserSettings(
        tokenizer=pickle.dumps(tokenizer) if backend is None else backend.to_str(),
        eos_token_id=manifest.eos_token_id,
        token_type=manifest.token_type,
        begin=tuple(manifest.bos),
        splits_special=bool(getattr(tokenizer, "split_special_tokens", False)),
    )
    already = frozenset(done)
    tasks = ((name, texts) for name, texts in _batches(settings) if name not in already)

    def counted(batch: Batch) -> Batch:
        progress(int(batch.lengths.sum()))
        return batch

    try:
        with closing(_tokenised(tasks, tokeniser, settings.workers)) as batches:
            for name, group in groupby(batches, key=itemgetter(0)):
                yield write_shard(folder, name, (counted(batch) for _, batch in group))
    except OverflowError as error:
        raise UserError(
            f"The tokenizer {manifest.tokenizer} has {manifest.vocab_size:,} tokens, but {error}. Correct its files."
        ) from error


def _batches(settings: PrepareSettings) -> Iterator[tuple[str, list[str]]]:
    """The documents in order, some at a time, and the name of the shard they belong to."""
    documents = iterate_documents(settings.entries, settings.root, settings.text_field, "SOURCE", settings.streaming)
    number = size = characters = 0  # of the shard, and of the batch
    batch: list[str] = []
    for text, where in documents:
        if len(text) > settings.shard_characters and not settings.keep_long:
            raise UserError(_too_long(text, where, settings))
        is_full = bool(size) and size + len(text) > settings.shard_characters
        if batch and (is_full or characters + len(text) > _BATCH_CHARACTERS):
            yield shard_name(number), batch
            batch, characters = [], 0
        if is_full:
            number, size = number + 1, 0
        batch.append(text)
        size, characters = size + len(text), characters + len(text)
    if batch:
        yield shard_name(number), batch


def _too_long(text: str, where: str, settings: PrepareSettings) -> str:
    return (
        f"{where}: a document of {len(text):,} characters is longer than a shard of {settings.shard_characters:,} "
        "(--shard-size). Add --keep-long, which gives it its own shard and keeps the finished ones, or "
        "split the document."
    )


def _tokenised(
    tasks: Iterator[tuple[str, list[str]]], settings: TokeniserSettings, workers: int
) -> Generator[tuple[str, Batch]]:
    """The batches in order; only a limited number are read ahead and wait to be written."""
    if workers == 1:
        tokeniser = Tokeniser(settings)
        yield from ((name, tokeniser(texts)) for name, texts in tasks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_process, (settings,))
    pending: deque[tuple[str, Future[Batch]]] = deque()
    try:
        for name, texts in tasks:
            pending.append((name, pool.submit(tokenise, texts)))
            if len(pending) >= _AHEAD * workers:
                yield _first(pending)
        while pending:
            yield _first(pending)
    except BrokenProcessPool as error:
        raise UserError(
            "A tokenising process was killed, perhaps because memory ran out. Use fewer --workers and run the same "
            "command again: finished shards are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _first(pending: deque[tuple[str, Future[Batch]]]) -> tuple[str, Batch]:
    name, future = pending.popleft()
    return name, future.result()


def _write_error(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{folder}: {reason}. Free some space and run the same command again: finished shards are kept."
        )
    return UserError(f"{folder} cannot be written to: {reason}. Fix its permissions, or name another folder.")
