"""Text for training: sources in, packed blocks to train on and held-out blocks to evaluate on, with a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.blocks import TokenBlocks, join, split_folders
from ast_sparse.data.held_out import training_tokens
from ast_sparse.data.packing import (
    document_keys,
    eos_token,
    pack_tokens,
    token_counts,
    tokenise_documents,
    tokenizer_key,
)
from ast_sparse.data.shards import ShardFolder
from ast_sparse.data.sources import Entry, Source, load_documents, shard_folders
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.config import DataConfig


Blocks: TypeAlias = Dataset | TokenBlocks


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What one source gives to one split."""

    name: str
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """One split: its sources joined in order and cut into blocks; `leftover` tokens do not fill a last block."""

    name: str
    documents: int
    tokens: int
    blocks: int
    leftover: int
    sources: tuple[SourceReport, ...]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the text. A document cut in two by the held-out share counts in both splits."""

    block_size: int
    train: SplitReport
    eval: SplitReport | None
    empty_documents: int

    def lines(self) -> list[str]:
        """The report as lines to print."""
        lines = []
        for split in (self.train, self.eval):
            if split is None:
                lines.append("held out: nothing")
                continue
            lines.append(
                f"{split.name}: {_counts(split)} -> {split.blocks:,} blocks of {self.block_size:,}, "
                f"{split.leftover:,} tokens left over"
            )
            if len(split.sources) > 1:
                lines.extend(f"  {source.name}: {_counts(source)}" for source in split.sources)
        if self.empty_documents:
            lines.append(f"empty documents left out: {self.empty_documents:,}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _counts(part: SplitReport | SourceReport) -> str:
    return f"{part.documents:,} document{'' if part.documents == 1 else 's'}, {part.tokens:,} tokens"


def build_datasets(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Blocks, Blocks | None, DataReport]:
    """Read, tokenise, hold out and pack; the result is cached by text, tokenizer, block size, share and seed.

    Token shards are tokenised already and are read where they lie. With `data.eval` nothing is held out of training;
    without it and with `data.eval_share: 0` nothing is evaluated on. How documents are held out: `training_tokens`.
    With several processes call it under `main_process_first()`.

    Returns:
        Training blocks, held-out blocks or None (rows `{"input_ids": block_size token ids}`), and the report.

    Raises:
        UserError: any source cannot be read, a split has less text than one block, or shards are of another tokenizer.
    """
    share = 0.0 if config.eval else config.eval_share
    train = _split(config, tokenizer, config.train, "data.train", share)
    held_out = _split(config, tokenizer, config.eval, "data.eval", 0.0) if config.eval else None
    blocks, train_report = train.pack("train", False, config)
    held_out_blocks, held_out_report = None, None
    if held_out is not None:
        held_out_blocks, held_out_report = held_out.pack("eval", False, config)
    elif share:
        held_out_blocks, held_out_report = train.pack("held out", True, config)
    empty = train.empty + (held_out.empty if held_out else 0)
    report = DataReport(block_size=config.block_size, train=train_report, eval=held_out_report, empty_documents=empty)
    return blocks, held_out_blocks, report


def _split(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, entries: Sequence[Entry], field: str, share: float
) -> _Text | _Shards:
    if folders := shard_folders(entries, config.root, field):
        return _Shards(folders, tokenizer, field, share, config.seed)
    return _Text(load_documents(entries, config.root, config.text_field, field=field), tokenizer, share, config.seed)


class _Text:
    """Sources of text, tokenised, and how many tokens of each document train."""

    def __init__(self, sources: list[Source], tokenizer: PreTrainedTokenizerBase, share: float, seed: int) -> None:
        self.names = [source.name for source in sources]
        self.tokenised = [tokenise_documents(s.documents, tokenizer, s.text_field, s.name) for s in sources]
        self.lengths = [token_counts(part) for part in self.tokenised]
        self.empty = sum(int((length == 0).sum()) for length in self.lengths)
        keys = [document_keys(part) for part in self.tokenised]
        self.cuts = training_tokens(keys, self.lengths, self.names, share, seed)

    def pack(self, split: str, is_held_out: bool, config: DataConfig) -> tuple[Dataset, SplitReport]:
        """The blocks of what trains, or of what is held out."""
        zeros = [np.zeros_like(length) for length in self.lengths]
        starts, stops = (self.cuts, self.lengths) if is_held_out else (zeros, self.cuts)
        sources = tuple(
            SourceReport(name=name, documents=int((stop > start).sum()), tokens=int((stop - start).sum()))
            for name, start, stop in zip(self.names, starts, stops, strict=True)
        )
        report = _split_report(split, sources, config)
        documents = datasets.concatenate_datasets(self.tokenised)
        return pack_tokens(documents, np.concatenate(starts), np.concatenate(stops), config.block_size, split), report


class _Shards:
    """Folders of shards, and which stretches of them train."""

    def __init__(
        self, folders: list[ShardFolder], tokenizer: PreTrainedTokenizerBase, field: str, share: float, seed: int
    ) -> None:
        key, eos = tokenizer_key(tokenizer), eos_token(tokenizer)
        for folder in folders:
            if (folder.manifest.tokenizer_key, folder.manifest.eos_token_id) != (key, eos):
                raise UserError(
                    f"`{field}`: the shards of {folder.name} were made with another tokenizer, of "
                    f"{folder.manifest.tokenizer}. Make them again with ast-data prepare --tokenizer "
                    f"{tokenizer.name_or_path}."
                )
        self.folders = folders
        self.empty = sum(folder.manifest.empty for folder in folders)
        self.stretches = split_folders(folders, share, seed)

    def pack(self, split: str, is_held_out: bool, config: DataConfig) -> tuple[TokenBlocks, SplitReport]:
        """The blocks of what trains, or of what is held out."""
        chosen = [pair[int(is_held_out)] for pair in self.stretches]
        sources = tuple(
            SourceReport(name=folder.name, documents=part.documents, tokens=part.tokens)
            for folder, part in zip(self.folders, chosen, strict=True)
        )
        report = _split_report(split, sources, config)
        return TokenBlocks(self.folders, join(chosen), config.block_size), report


def calibration_blocks(
    entries: Sequence[Entry],
    root: str | None,
    text_field: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    field: str = "calibration.data",
) -> Dataset:
    """Text for one-shot pruning as packed blocks (rows `{"input_ids": block_size token ids}`), cached.

    Raises:
        UserError: a source cannot be read, or there is less text than one block.
    """
    sources = load_documents(entries, root, text_field, field=field)
    tokenised = [tokenise_documents(s.documents, tokenizer, s.text_field, s.name) for s in sources]
    ends = np.concatenate([token_counts(part) for part in tokenised])
    if ends.sum() < block_size:
        raise UserError(
            f"`{field}`: {', '.join(source.name for source in sources)} has {int(ends.sum()):,} tokens, fewer than one "
            f"sequence of {block_size:,}. Give more text, or shorter sequences."
        )
    return pack_tokens(datasets.concatenate_datasets(tokenised), np.zeros_like(ends), ends, block_size, "calibration")


def _split_report(split: str, sources: tuple[SourceReport, ...], config: DataConfig) -> SplitReport:
    tokens = sum(source.tokens for source in sources)
    if tokens < config.block_size:
        raise UserError(_too_short(split, [source.name for source in sources], tokens, config))
    return SplitReport(
        name=split,
        documents=sum(source.documents for source in sources),
        tokens=tokens,
        blocks=tokens // config.block_size,
        leftover=tokens % config.block_size,
        sources=sources,
    )


def _too_short(split: str, names: list[str], tokens: int, config: DataConfig) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    need = f"has {tokens:,} tokens, fewer than one block of `data.block_size` = {config.block_size:,}"
    if split == "held out":
        return (
            f"The text held out of {shown} (`data.eval_share` = {config.eval_share:g}) {need}. "
            "Raise `data.eval_share`, lower `data.block_size`, or name `data.eval`."
        )
    after = " after the held-out share" if split == "train" and config.eval_share and not config.eval else ""
    return f"The text of {shown} {need}{after}. Give more text in `data.{split}` or lower `data.block_size`."
