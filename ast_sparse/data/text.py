"""Text for training: sources in, packed blocks to train on and held-out blocks to evaluate on, with a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.packing import document_keys, pack_tokens, token_counts, tokenise_documents
from ast_sparse.data.sources import Entry, load_documents
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.config import DataConfig

_FEW_DOCUMENTS = 20  # with fewer, whole documents are too coarse a unit to hold out


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


def build_datasets(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None, DataReport]:
    """Read, tokenise, hold out and pack; the result is cached by text, tokenizer, block size, share and seed.

    With `data.eval` nothing is held out of training; without it and with `data.eval_share: 0` nothing is evaluated on.
    How documents are held out: `training_tokens`. With several processes call it under `main_process_first()`.

    Returns:
        Training blocks, held-out blocks or None (rows `{"input_ids": block_size token ids}`), and the report.

    Raises:
        UserError: any source cannot be read, or a split has less text than one block.
    """
    sources = load_documents(config.train, config.root, config.text_field, field="data.train")
    tokenised = [tokenise_documents(s.documents, tokenizer, s.text_field, s.name) for s in sources]
    names = [source.name for source in sources]
    lengths = [token_counts(part) for part in tokenised]
    empty = sum(int((length == 0).sum()) for length in lengths)
    share = 0.0 if config.eval else config.eval_share
    cuts = training_tokens([document_keys(part) for part in tokenised], lengths, names, share, config.seed)
    zeros = [np.zeros_like(length) for length in lengths]
    train, train_report = _pack_split("train", names, tokenised, zeros, cuts, config)
    held_out, held_out_report = None, None
    if config.eval:
        eval_sources = load_documents(config.eval, config.root, config.text_field, field="data.eval")
        parts = [tokenise_documents(s.documents, tokenizer, s.text_field, s.name) for s in eval_sources]
        ends = [token_counts(part) for part in parts]
        empty += sum(int((end == 0).sum()) for end in ends)
        starts = [np.zeros_like(end) for end in ends]
        held_out, held_out_report = _pack_split("eval", [s.name for s in eval_sources], parts, starts, ends, config)
    elif share:
        held_out, held_out_report = _pack_split("held out", names, tokenised, cuts, lengths, config)
    report = DataReport(block_size=config.block_size, train=train_report, eval=held_out_report, empty_documents=empty)
    return train, held_out, report


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


def _pack_split(
    split: str,
    names: list[str],
    tokenised: list[Dataset],
    starts: list[np.ndarray],
    stops: list[np.ndarray],
    config: DataConfig,
) -> tuple[Dataset, SplitReport]:
    sources = tuple(
        SourceReport(name=name, documents=int((stop > start).sum()), tokens=int((stop - start).sum()))
        for name, start, stop in zip(names, starts, stops, strict=True)
    )
    tokens = sum(source.tokens for source in sources)
    size = config.block_size
    if tokens < size:
        raise UserError(_too_short(split, names, tokens, config))
    joined = datasets.concatenate_datasets(tokenised)
    blocks = pack_tokens(joined, np.concatenate(starts), np.concatenate(stops), size, split)
    report = SplitReport(
        name=split,
        documents=sum(source.documents for source in sources),
        tokens=tokens,
        blocks=len(blocks),
        leftover=tokens - len(blocks) * size,
        sources=sources,
    )
    return blocks, report


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


def training_tokens(
    keys: Sequence[np.ndarray], lengths: Sequence[np.ndarray], names: Sequence[str], share: float, seed: int
) -> list[np.ndarray]:
    """How many tokens of each document train; the rest of it is held out.

    Whole documents are held out: of each source the `ceil(share · n)` with the smallest hash of (seed, text), so that
    neither the order of files nor copies of a document matter; a copy in another source goes the same way. Of a source
    with fewer than 20 documents the last `share` of its tokens is held out, which cuts one document in two.

    Args:
        keys, lengths: per source `[documents]`, hash of the text and tokens; empty documents have length 0.
        names: of the sources, for messages.

    Returns:
        Per source `[documents]` int64, between 0 (held out) and the document's length (trains).

    Raises:
        UserError: a document of a source with fewer than 20 has a copy somewhere, so that the cut would let it leak.
    """
    if share == 0:
        return [length.copy() for length in lengths]
    few = [int(np.count_nonzero(length)) < _FEW_DOCUMENTS for length in lengths]
    chosen = [
        _smallest(key[length > 0], share, seed)
        for key, length, is_few in zip(keys, lengths, few, strict=True)
        if not is_few
    ]
    held_out = np.unique(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.uint64)
    if any(few):
        _refuse_copies(keys, lengths, names, few)
    return [
        _all_but_the_tail(length, share) if is_few else np.where(np.isin(key, held_out), 0, length)
        for key, length, is_few in zip(keys, lengths, few, strict=True)
    ]


def _smallest(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    order = _mix(keys ^ _mix(np.asarray([seed % 2**64], dtype=np.uint64)))
    count = _ceil_share(share, len(keys))
    return keys[order <= np.partition(order, count - 1)[count - 1]]


def _ceil_share(share: float, n: int) -> int:
    return min(n, math.ceil(share * n - 1e-9))  # 0.07 · 100 is 7.000000000000001


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: uint64 to uint64, one to one, every bit depending on every other."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _all_but_the_tail(lengths: np.ndarray, share: float) -> np.ndarray:
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    return np.clip(total - _ceil_share(share, total) - before, 0, lengths)


def _refuse_copies(
    keys: Sequence[np.ndarray], lengths: Sequence[np.ndarray], names: Sequence[str], few: Sequence[bool]
) -> None:
    present = np.concatenate([key[length > 0] for key, length in zip(keys, lengths, strict=True)])
    distinct, counts = np.unique(present, return_counts=True)
    copied = distinct[counts > 1]
    for key, length, name, is_few in zip(keys, lengths, names, few, strict=True):
        if is_few and np.isin(key[length > 0], copied).any():
            raise UserError(
                f"A document of {name} occurs twice in `data.train`. With fewer than {_FEW_DOCUMENTS} documents the "
                "end of the text is held out (`data.eval_share`), and the copy would leak it into training. Remove the "
                "copy, name `data.eval`, or set `data.eval_share: 0`."
            )
