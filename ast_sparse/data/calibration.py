"""Text for one-shot pruning: packed blocks, and the windows that calibration runs on."""

import logging
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ast_sparse.config import CalibrationConfig
from ast_sparse.data.blocks.packing import pack_tokens
from ast_sparse.data.build import tokenise_all
from ast_sparse.data.sources.documents import load_documents
from ast_sparse.data.sources.entries import Entry
from ast_sparse.data.tokens.bos import find_bos
from ast_sparse.data.tokens.chat import uncounted_rows
from ast_sparse.data.tokens.tokenise import token_counts
from ast_sparse.errors import UserError

logger = logging.getLogger(__name__)


def calibration_blocks(
    entries: Sequence[Entry],
    root: str | None,
    text_field: str,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    field: str = "calibration.data",
    bos: str = "auto",
) -> Dataset:
    """Text for one-shot pruning as packed blocks (rows `{"input_ids": block_size token ids}`), cached.

    Args:
        bos: as in `data.bos`.

    Raises:
        UserError: a source cannot be read, or there is less text than one block.
    """
    sources = load_documents(entries, root, text_field, field=field)
    found = find_bos(bos, tokenizer)
    tokenised = tokenise_all(sources, tokenizer, found)
    counts = [token_counts(part) for part in tokenised]
    for source, lengths in zip(sources, counts, strict=True):
        if source.is_chat and (line := uncounted_rows(lengths, source.name)):
            logger.warning(line)
    ends = np.concatenate(counts)
    if ends.sum() < block_size - len(found.of_block):
        raise UserError(
            f"`{field}`: {', '.join(source.name for source in sources)} has {int(ends.sum()):,} tokens, fewer than one "
            f"sequence of {block_size:,}. Give more text, or shorter sequences."
        )
    documents = datasets.concatenate_datasets(tokenised)
    return pack_tokens(documents, np.zeros_like(ends), ends, block_size, "calibration", found)


def calibration_samples(blocks: Any, config: CalibrationConfig, front: tuple[int, ...] = ()) -> Tensor:
    """Windows of packed text for one-shot pruning, chosen by `config.seed`.

    Args:
        blocks: rows `{"input_ids": ...}` of one length, as `pack_dataset` makes them: one stream cut into blocks.
        config: how many windows; their length, by default that of a block.
        front: tokens at the start of every block; every window starts with them too.

    Returns:
        `[samples, seq_len]` int64.

    Raises:
        UserError: there are no such rows, or too few tokens.
    """
    if not isinstance(blocks, Sequence | Dataset) or not len(blocks) or "input_ids" not in blocks[0]:
        raise UserError(
            "There is no text to calibrate on: packed blocks (`input_ids`) are needed. Set calibration.data, or pass "
            "calibration_dataset."
        )
    seq_len = config.seq_len or len(blocks[0]["input_ids"])
    size, length = len(blocks[0]["input_ids"]) - len(front), seq_len - len(front)  # without `front`
    tokens = len(blocks) * size
    windows = tokens // length
    if windows < config.samples:
        raise UserError(
            f"The calibration text has {tokens:,} tokens, fewer than calibration.samples={config.samples} windows of "
            f"{seq_len:,}. Give more text, or lower calibration.samples or calibration.seq_len.",
            "calibration.samples",
            "calibration.seq_len",
        )
    chosen = np.random.default_rng(config.seed).permutation(windows)[: config.samples]
    samples = torch.as_tensor(front, dtype=torch.long).repeat(config.samples, 1)
    texts = torch.empty(config.samples, length, dtype=torch.long)
    for text, window in zip(texts, chosen.tolist(), strict=True):
        start = window * length
        rows = range(start // size, (start + length - 1) // size + 1)
        stream = torch.cat([torch.as_tensor(blocks[row]["input_ids"], dtype=torch.long)[len(front) :] for row in rows])
        if len(stream) != len(rows) * size:
            raise UserError(
                f"The rows to calibrate on differ in length: the first has {size} tokens. Pass packed blocks as "
                "calibration_dataset."
            )
        text.copy_(stream[start % size :][:length])
    return torch.cat([samples, texts], dim=1)
