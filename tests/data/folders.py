"""Text and shards in folders."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ast_sparse.config import DataConfig
from ast_sparse.data.build import Blocks, DataReport, build_datasets
from ast_sparse.data.tokens.prepare import PrepareSettings, prepare_shards
from ast_sparse.data.tokens.shards import (
    MANIFEST,
)
from tests.models import tiny_tokenizer


def write(folder: Path, name: str, texts: Sequence[str]) -> str:
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return name


def build(folder: Path, *train: Any, **settings: Any) -> tuple[Blocks, Blocks | None, DataReport]:
    config = DataConfig(root=str(folder), train=train, **{"block_size": 8, **settings})
    return build_datasets(config, tiny_tokenizer())


def shards(folder: Path, name: str, characters: int = 500) -> str:
    settings = PrepareSettings(entries=(name,), root=str(folder), shard_characters=characters, keep_long=True)
    out = Path(name).stem
    prepare_shards(folder / out, settings, tiny_tokenizer())
    return out


def settings(root: Path, *entries: Any, **values: Any) -> PrepareSettings:
    return PrepareSettings(entries=entries, root=str(root), **{"shard_characters": 400, **values})


def edited(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**content, **values}))

    return edit


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


_BITS = 2**64 - 1


def mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
    return value ^ (value >> 31)
