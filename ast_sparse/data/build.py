"""Text for training: sources in, packed blocks to train on and held-out blocks to evaluate on, with a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.blocks.collator import Borders, document_borders
from ast_sparse.data.blocks.counted import counted_tokens, nothing_counted
from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.data.blocks.held_out import training_tokens
from ast_sparse.data.blocks.packing import left_over, pack_tokens
from ast_sparse.data.blocks.stored import TokenBlocks, join, split_folders
from ast_sparse.data.blocks.streaming import StreamedBlocks
from ast_sparse.data.sources.documents import Source, load_documents
from ast_sparse.data.sources.entries import Entry, shard_folders
from ast_sparse.data.tokens.bos import Bos, bos_of_shards, find_bos
from ast_sparse.data.tokens.chat import tokenise_conversations, uncounted_rows
from ast_sparse.data.tokens.shards import ShardFolder
from ast_sparse.data.tokens.tokenise import (
    document_keys,
    eos_token,
    token_counts,
    tokenise_documents,
    tokenizer_key,
    with_labels,
)
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.config import DataConfig

Blocks: TypeAlias = Dataset | TokenBlocks | DomainBlocks | StreamedBlocks


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What one source contributes to one split."""

    name: str
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """One split: its sources joined in order and cut into blocks; `leftover` tokens do not fill a last block.

    For chat data, and for documents that are kept apart, `counted` tokens of the blocks enter the loss. `empty` blocks
    have no such token, and a run leaves them out.
    """

    name: str
    documents: int
    tokens: int
    blocks: int
    leftover: int
    sources: tuple[SourceReport, ...]
    counted: int | None = None  # None: all but the first token of each block
    empty: int = 0


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of the text. A document cut in two by the held-out share counts in both splits."""

    block_size: int
    train: SplitReport | None  # None: streamed, so its length is not known
    eval: SplitReport | None
    empty_documents: int
    uncounted: tuple[str, ...] = ()  # a line for each chat source that has rows with nothing to count
    bos: str | None = None  # where BOS goes, for a tokenizer that uses it

    def lines(self) -> list[str]:
        """The report as lines to print."""
        lines: list[str] = []
        for split in (self.train, self.eval):
            if split is None:
                lines.append("held out: nothing" if lines else "train: streamed, tokenised during training")
                continue
            lines.append(
                f"{split.name}: {_counts(split)} -> {split.blocks:,} blocks of {self.block_size:,}, "
                f"{split.leftover:,} tokens left over"
            )
            if split.counted is not None:
                lines.append(f"  counted in the loss: {split.counted:,} tokens; {_left_out(split.empty)}")
            if len(split.sources) > 1:
                lines.extend(f"  {source.name}: {_counts(source)}" for source in split.sources)
        if self.empty_documents:
            lines.append(f"empty documents left out: {self.empty_documents:,}")
        lines.extend(f"warning: {line}" for line in self.uncounted)
        return lines + ([self.bos] if self.bos else [])

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _counts(part: SplitReport | SourceReport) -> str:
    return f"{part.documents:,} document{'' if part.documents == 1 else 's'}, {part.tokens:,} tokens"


def _left_out(empty: int) -> str:
    return f"{empty:,} block{'' if empty == 1 else 's'} without a counted token left out"


def build_datasets(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Blocks, Blocks | None, DataReport]:
    """Read, tokenise, hold out and pack; the result is cached by text, tokenizer, block size, share and seed.

    Token shards are already tokenised and are read in place. With `data.eval` nothing is held out of training. Without
    it, and with `data.eval_share: 0`, there is no held-out text. `training_tokens` says how documents are held out.
    With several processes call it in `once_per_folder`.

    Returns:
        Training blocks, held-out blocks or None (rows `{"input_ids": block_size token ids}`, and `labels` for
        chat data), and the report. With `data.domains` both are `DomainBlocks`. Blocks without a counted token are
        included, and the report counts them; `with_counted_tokens` leaves them out.

    Raises:
        UserError: a source cannot be read, a split or a domain has less text than one block or nothing that the loss
            counts, or shards were made with another tokenizer.
    """
    trained, evaluated = config.entries("train"), config.entries("eval")
    bos = find_bos(config.bos, tokenizer)
    if config.streaming:
        return _streamed(config, tokenizer, bos)
    train = _read(config, tokenizer, trained, 0.0 if evaluated else config.eval_share, bos)
    held_out = _read(config, tokenizer, evaluated, 0.0, bos) if evaluated else None
    borders = document_borders(tokenizer, config.packing, config.bos)
    blocks, train_report = _pack(train, "train", False, config, borders)
    held_out_blocks, held_out_report = None, None
    if held_out is not None:
        held_out_blocks, held_out_report = _pack(held_out, "eval", False, config, borders)
    elif config.eval_share:
        held_out_blocks, held_out_report = _pack(train, "held out", True, config, borders)
    empty = train.empty + (held_out.empty if held_out else 0)
    lines = dict.fromkeys(part.bos.line(tokenizer) for part in (train, held_out) if part is not None)
    report = DataReport(
        block_size=config.block_size,
        train=train_report,
        eval=held_out_report,
        empty_documents=empty,
        uncounted=train.uncounted + (held_out.uncounted if held_out else ()),
        bos="; held out: ".join(line for line in lines if line) or None,
    )
    return blocks, held_out_blocks, report


def _streamed(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, bos: Bos
) -> tuple[StreamedBlocks, Blocks | None, DataReport]:
    train = StreamedBlocks(config.train or (), config.root, config.text_field, tokenizer, config.block_size, bos)
    next(iter(train))  # finds text that cannot be read before a model is loaded
    held_out, blocks, eval_report = None, None, None
    if evaluated := config.entries("eval"):
        held_out = _read(config, tokenizer, evaluated, 0.0, bos)
        blocks, eval_report = _pack(
            held_out, "eval", False, config, document_borders(tokenizer, config.packing, config.bos)
        )
    empty, uncounted = (held_out.empty, held_out.uncounted) if held_out else (0, ())
    report = DataReport(
        block_size=config.block_size,
        train=None,
        eval=eval_report,
        empty_documents=empty,
        uncounted=uncounted,
        bos=bos.line(tokenizer),
    )
    return train, blocks, report


def _read(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    entries: Mapping[str, Sequence[Entry]],
    share: float,
    bos: Bos,
) -> _Text | _Shards:
    folders = {field: shard_folders(part, config.root, field) for field, part in entries.items()}
    if any(folders.values()):
        shards = _Shards(folders, tokenizer, share, config.seed, bos, config.bos)
        if config.packing == "documents":
            _check_borders(shards.bos, bos, eos_token(tokenizer))
        return shards
    sources = {
        field: load_documents(part, config.root, config.text_field, field=field) for field, part in entries.items()
    }
    return _Text(sources, tokenizer, share, config.seed, bos)


def _check_borders(found: Bos, expected: Bos, eos: int) -> None:
    """Raise UserError if shards have BOS where `document_borders` does not expect it, and it also ends documents."""
    if found.tokens != expected.tokens and eos in (*found.tokens[:1], *expected.tokens[:1]):
        where = f"begin their documents with BOS {list(found.tokens)}" if found.tokens else "have no BOS"
        raise UserError(
            f"data.bos='auto': the shards {where}, unlike what the tokenizer itself does, and BOS also ends documents. "
            f"So that data.packing='documents' finds where they begin, set data.bos: "
            f"{'document' if found.tokens else 'none'}."
        )


class _Text:
    """Sources of text, tokenised, and how many tokens of each document are for training."""

    def __init__(
        self,
        sources: Mapping[str, list[Source]],
        tokenizer: PreTrainedTokenizerBase,
        share: float,
        seed: int,
        bos: Bos,
    ) -> None:
        self.bos = bos
        self.fields = [field for field, part in sources.items() for _ in part]
        every = [source for part in sources.values() for source in part]
        self.names = [source.name for source in every]
        self.tokenised = tokenise_all(every, tokenizer, bos)
        self.lengths = [token_counts(part) for part in self.tokenised]
        pairs = list(zip(every, self.lengths, strict=True))
        self.empty = sum(int((length == 0).sum()) for source, length in pairs if not source.is_chat)
        lost = [uncounted_rows(length, source.name) for source, length in pairs if source.is_chat]
        self.uncounted = tuple(line for line in lost if line)
        keys = [document_keys(part) for part in self.tokenised]
        self.cuts = training_tokens(keys, self.lengths, self.names, share, seed)

    def report(self, source: int, is_held_out: bool) -> SourceReport:
        """What a source contributes to training, or what is held out of it."""
        start, stop = self._range(source, is_held_out)
        documents, tokens = int((stop > start).sum()), int((stop - start).sum())
        return SourceReport(name=self.names[source], documents=documents, tokens=tokens)

    def blocks(self, sources: list[int], is_held_out: bool, block_size: int, label: str) -> tuple[Dataset, int]:
        """The same text as blocks, several sources joined, and how many tokens are left over."""
        starts, stops = map(np.concatenate, zip(*(self._range(each, is_held_out) for each in sources), strict=True))
        documents = datasets.concatenate_datasets([self.tokenised[source] for source in sources])
        packed = pack_tokens(documents, starts, stops, block_size, label, self.bos)
        return packed, left_over(documents, starts, stops, block_size, label, self.bos)

    def _range(self, source: int, is_held_out: bool) -> tuple[np.ndarray, np.ndarray]:
        cut = self.cuts[source]
        return (cut, self.lengths[source]) if is_held_out else (np.zeros_like(cut), cut)


class _Shards:
    """Folders of shards, and which stretches of them are for training."""

    def __init__(
        self,
        folders: Mapping[str, list[ShardFolder]],
        tokenizer: PreTrainedTokenizerBase,
        share: float,
        seed: int,
        bos: Bos,
        choice: str,
    ) -> None:
        self.fields = [field for field, part in folders.items() for _ in part]
        self.folders = [folder for part in folders.values() for folder in part]
        key, eos = tokenizer_key(tokenizer), eos_token(tokenizer)
        for field, folder in zip(self.fields, self.folders, strict=True):
            if (folder.manifest.tokenizer_key, folder.manifest.eos_token_id) != (key, eos):
                raise UserError(
                    f"`{field}`: the shards of {folder.name} were made with another tokenizer, that of "
                    f"{folder.manifest.tokenizer}. Make them again with ast-data prepare --tokenizer "
                    f"{tokenizer.name_or_path}."
                )
        self.bos = bos_of_shards(self.fields, self.folders, bos, choice)
        self.empty = sum(folder.manifest.empty for folder in self.folders)
        self.uncounted: tuple[str, ...] = ()
        self.stretches = split_folders(self.folders, share, seed)

    def report(self, source: int, is_held_out: bool) -> SourceReport:
        """What a folder contributes to training, or what is held out of it."""
        part = self.stretches[source][int(is_held_out)]
        return SourceReport(name=self.folders[source].name, documents=part.documents, tokens=part.tokens)

    def blocks(self, sources: list[int], is_held_out: bool, block_size: int, label: str) -> tuple[TokenBlocks, int]:
        """The same text as blocks, several folders joined, and how many tokens are left over."""
        chosen = join([self.stretches[source][int(is_held_out)] for source in sources])
        found = TokenBlocks(self.folders, chosen, block_size, self.bos.of_block)
        return found, chosen.tokens % (block_size - len(self.bos.of_block))


def _pack(
    split: _Text | _Shards, name: str, is_held_out: bool, config: DataConfig, borders: Borders | None
) -> tuple[Blocks, SplitReport]:
    """Pack one split, each domain separately if there are domains."""
    every = list(range(len(split.fields)))
    if not config.domains:
        return _packed(split, name, is_held_out, config, borders, every, name)
    parts, totals = {}, []
    for domain in config.domains:
        chosen = [source for source in every if split.fields[source].startswith(f"data.domains.{domain}.")]
        try:
            label = f"{domain}, {name}"
            parts[domain], total = _packed(split, name, is_held_out, config, borders, chosen, label)
            totals.append(total)
        except UserError as error:
            raise UserError(f"data.domains.{domain}: {error}") from None
    keys = ("documents", "tokens", "blocks", "leftover", "empty")
    sums: dict[str, Any] = {key: sum(getattr(part, key) for part in totals) for key in keys}
    if any(part.counted is not None for part in totals):
        sums["counted"] = sum(_counted_tokens(part, config.block_size) for part in totals)
    domains = tuple(
        SourceReport(name=domain, documents=part.documents, tokens=part.tokens)
        for domain, part in zip(parts, totals, strict=True)
    )
    return DomainBlocks(parts), SplitReport(name=name, sources=domains, **sums)


def _packed(
    split: _Text | _Shards,
    name: str,
    is_held_out: bool,
    config: DataConfig,
    borders: Borders | None,
    chosen: list[int],
    label: str,
) -> tuple[Dataset | TokenBlocks, SplitReport]:
    """Pack the chosen sources of a split, and report on them."""
    sources = tuple(split.report(source, is_held_out) for source in chosen)
    tokens = sum(source.tokens for source in sources)
    blocks, leftover = split.blocks(chosen, is_held_out, config.block_size, label)
    if not len(blocks):
        raise UserError(_too_short(name, [source.name for source in sources], tokens, config))
    report = SplitReport(
        name=name,
        documents=sum(source.documents for source in sources),
        tokens=tokens,
        blocks=len(blocks),
        leftover=leftover,
        sources=sources,
    )
    return blocks, _counted(blocks, report, borders)


def _counted(blocks: Dataset | TokenBlocks, report: SplitReport, borders: Borders | None) -> SplitReport:
    """Add what the loss counts to a report, except for raw text read as one stream, where every block counts."""
    if not isinstance(blocks, Dataset) or ("labels" not in blocks.column_names and borders is None):
        return report
    found = counted_tokens(blocks, borders)
    if not found.any():
        raise UserError(nothing_counted(f"The text of {_names(report.sources)} ({report.name})", len(blocks)))
    return replace(report, counted=int(found.sum()), empty=int((found == 0).sum()))


def _counted_tokens(report: SplitReport, block_size: int) -> int:
    return report.blocks * (block_size - 1) if report.counted is None else report.counted


def _names(sources: Sequence[SourceReport]) -> str:
    return ", ".join(source.name for source in sources[:3]) + (f" and {len(sources) - 3} more" if sources[3:] else "")


def tokenise_all(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, bos: Bos) -> list[Dataset]:
    """Tokenise every source; if any is chat data, raw text gets labels too: all its tokens."""
    tokenised = [
        tokenise_conversations(source.documents, tokenizer, source.name, bos.of_document)
        if source.is_chat
        else tokenise_documents(source.documents, tokenizer, source.text_field, source.name, bos)
        for source in sources
    ]
    if not any(source.is_chat for source in sources):
        return tokenised
    return [part if source.is_chat else with_labels(part) for part, source in zip(tokenised, sources, strict=True)]


def _too_short(split: str, names: list[str], tokens: int, config: DataConfig) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    need = f"has {tokens:,} tokens, fewer than one block of `data.block_size` = {config.block_size:,}"
    if split == "held out":
        return (
            f"The text held out of {shown} (`data.eval_share` = {config.eval_share:g}) {need}. "
            "Raise `data.eval_share`, lower `data.block_size`, or set `data.eval`."
        )
    after = " after the held-out share" if split == "train" and config.eval_share and not config.entries("eval") else ""
    where = "" if config.domains else f" in `data.{split}`"
    return f"The text of {shown} {need}{after}. Give more text{where} or lower `data.block_size`."
