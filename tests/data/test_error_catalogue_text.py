"""Messages about text and domains that no other test triggers: each fault ends in its line."""

import copy
import os
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from ast_sparse.config import DataConfig, MixtureConfig
from ast_sparse.config.yaml12 import read_yaml
from ast_sparse.data.sources import entries, text_files
from ast_sparse.data.sources.documents import load_documents
from ast_sparse.data.sources.entries import check_sources
from ast_sparse.data.tokens.chat import tokenise_conversations
from ast_sparse.data.tokens.prepare import PrepareSettings, prepare_shards
from tests.faults import ends_in_a_line
from tests.models import tiny_tokenizer

Patch = pytest.MonkeyPatch


# ---- text --------------------------------------------------------------------------------------------------------


def text_too_large(root: Path, patch: Patch) -> None:
    (root / "a.txt").write_text("two of four")
    patch.setattr(text_files, "_LARGEST_TEXT_FILE", 10)
    list(text_files.file_documents([root / "a.txt"], "text", "text"))


def array_too_large(root: Path, patch: Patch) -> None:
    (root / "a.json").write_text('[{"text": "two of four"}]')
    patch.setattr(text_files, "_LARGEST_TEXT_FILE", 10)
    list(text_files.file_documents([root / "a.json"], "json", "text"))


def no_sources(root: Path, patch: Patch) -> None:
    load_documents([], None, "text")


def text_without_rights(root: Path, patch: Patch) -> None:
    (root / "a.txt").write_text("two of four")
    patch.setattr(os, "access", lambda path, mode: False)
    check_sources(DataConfig(train="a.txt", root=str(root)))


def damaged_parquet(root: Path, patch: Patch) -> None:
    file = root / "a.parquet"
    pq.write_table(pa.table({"text": [f"{number} of four" for number in range(2000)]}), file, compression="snappy")
    data = bytearray(file.read_bytes())
    data[4:4000] = bytes(3996)
    file.write_bytes(data)
    load_documents(["a.parquet"], str(root), "text")


def text_of_blanks(root: Path, patch: Patch) -> None:
    (root / "a.jsonl").write_text('{"text": "two"}\n')
    patch.setattr(
        "ast_sparse.data.tokens.prepare.iterate_documents", lambda *args, **kwargs: iter([(" ", "a"), ("\n", "a")])
    )
    prepare_shards(root / "out", PrepareSettings(entries=("a.jsonl",), root=str(root)), tiny_tokenizer())


def tokens_beyond_the_type(root: Path, patch: Patch) -> None:
    (root / "a.jsonl").write_text('{"text": "two of four"}\n')
    patch.setattr("ast_sparse.data.tokens.prepare.token_type", lambda size: "uint8")
    patch.setattr(
        "ast_sparse.data.tokens.shard_writer._encoder", lambda tokenizer: lambda texts: [[300] for _ in texts]
    )
    prepare_shards(root / "out", PrepareSettings(entries=("a.jsonl",), root=str(root)), tiny_tokenizer())


def shards_without_rights(root: Path, patch: Patch) -> None:
    (root / "a.jsonl").write_text('{"text": "two of four"}\n')

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    patch.setattr("ast_sparse.data.tokens.prepare.write_json", refused)
    prepare_shards(root / "out", PrepareSettings(entries=("a.jsonl",), root=str(root)), tiny_tokenizer())


def worker_that_is_killed(root: Path, patch: Patch) -> None:
    class Killed:
        def __init__(self, *args: Any) -> None: ...

        def submit(self, *args: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool("a process was killed"))
            return future

        def shutdown(self, **kwargs: Any) -> None: ...

    (root / "a.jsonl").write_text('{"text": "two of four"}\n')
    patch.setattr("ast_sparse.data.tokens.prepare.ProcessPoolExecutor", Killed)
    prepare_shards(root / "out", PrepareSettings(entries=("a.jsonl",), root=str(root), workers=2), tiny_tokenizer())


def chat_and_slow_tokenizer(root: Path, patch: Patch) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    patch.setattr(type(tokenizer), "is_fast", False)
    rows = Dataset.from_dict({"prompt": ["two"], "completion": [" of four"]})
    tokenise_conversations(rows, tokenizer, "a.jsonl")


def config_without_rights(root: Path, patch: Patch) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (root / "run.yaml").write_text("model: {}")
    patch.setattr(Path, "open", refused)
    read_yaml(root / "run.yaml")


# ---- domains -----------------------------------------------------------------------------------------------------


def domain_without_share(root: Path, patch: Patch) -> None:
    MixtureConfig(shares={"cc": 1.0}).check_names(["cc", "wiki"])


def shards_beside_text(root: Path, patch: Patch) -> None:
    patch.setattr(entries, "shard_folders", lambda part, root, field: "cc" in field)
    for name in ("cc", "wiki"):
        (root / f"{name}.txt").write_text("the text")
    domains = {name: {"train": [f"{name}.txt"]} for name in ("cc", "wiki")}
    check_sources(DataConfig(root=str(root), domains=domains))


CATALOGUE: list[tuple[Callable[[Path, Patch], None], str]] = [
    (text_too_large, "a.txt is larger than 1 GiB, and a text file is one document. Write its documents as JSONL."),
    (array_too_large, "a.json is larger than 1 GiB, and an array is read in one go. Write its elements as JSONL."),
    (no_sources, "`data.train` names no text. List files or data sets."),
    (text_without_rights, "`data.train`: .*a.txt cannot be read: permission denied."),
    (damaged_parquet, "a.parquet is damaged: .* Copy or write it again."),
    (text_of_blanks, "a.jsonl has no text. Give other text."),
    (tokens_beyond_the_type, "has .* tokens, but token 300 does not fit uint8. Correct its files."),
    (shards_without_rights, "out cannot be written to: Permission denied. Fix its permissions, or name another"),
    (worker_that_is_killed, "A tokenising process was killed, perhaps because memory ran out. Use fewer --workers"),
    (chat_and_slow_tokenizer, "a.jsonl is chat data, and the tokenizer of .* is a slow one"),
    (config_without_rights, "Config .*run.yaml' cannot be read \\(Permission denied\\). Give a readable file."),
    (domain_without_share, "data.domains.wiki.share is missing. Give a share to every domain"),
    (shards_beside_text, "`data.domains.cc.train` is a folder of shards and `data.domains.wiki.train` is text."),
]


@pytest.mark.parametrize(("fault", "message"), CATALOGUE, ids=[fault.__name__ for fault, _ in CATALOGUE])
def test_a_fault_ends_in_its_line(
    fault: Callable[[Path, Patch], None], message: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    ends_in_a_line(fault, message, tmp_path, monkeypatch)
