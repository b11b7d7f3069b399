"""Blocks of text that is tokenised during training: nothing is stored, and the length is unknown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.blocks.packing import block_begins
from ast_sparse.data.sources.documents import iterate_documents
from ast_sparse.data.sources.entries import Entry
from ast_sparse.data.tokens.bos import NO_BOS, Bos
from ast_sparse.data.tokens.tokenise import eos_token, token_ids
from ast_sparse.errors import UserError

_DOCUMENTS = 16  # tokenised at once


class StreamedBlocks(IterableDataset[dict[str, Any]]):
    """The documents of sources in their order, joined and cut into blocks: rows `{"input_ids": int64 [block_size]}`.

    The blocks are those that `pack_tokens` makes from the text, repeated endlessly. A resumed run reads and tokenises
    the used text again and continues with the next block. Data sets of the hub are read over the network.

    Args:
        entries, root, text_field: as in `data.train`.
        bos: what goes before documents or blocks.

    Attributes:
        embeddings: of the model; a larger token raises UserError when it is read. None: any.
    """

    embeddings: int | None = None

    def __init__(
        self,
        entries: Sequence[Entry],
        root: str | None,
        text_field: str,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        bos: Bos = NO_BOS,
    ) -> None:
        self.entries = entries
        self.root = root
        self.text_field = text_field
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.bos = bos
        self.eos = eos_token(tokenizer)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        carried = np.empty(0, dtype=np.int64)
        front = self.bos.of_block
        for tokens in self._stream():
            stream = np.concatenate([carried, tokens])
            begins, end = block_begins(stream, self.block_size, self.bos)
            for at, before in begins:
                text = stream[at : at + self.block_size - before]
                yield {"input_ids": np.concatenate([np.asarray(front, dtype=np.int64), text]) if before else text}
            carried = stream[end:]

    def _stream(self) -> Iterator[np.ndarray]:
        """The tokens of all sources, a few documents at a time, repeated endlessly."""
        while True:
            total = 0
            documents = iterate_documents(self.entries, self.root, self.text_field, "data.train", streaming=True)
            while texts := [text for text, _ in islice(documents, _DOCUMENTS)]:
                tokens = np.concatenate(list(token_ids(self.tokenizer, texts, self.eos, self.bos.of_document)))
                total += len(tokens)
                if self.embeddings is not None and int(tokens.max(initial=0)) >= self.embeddings:
                    raise UserError(
                        f"`data.train`: the tokenizer makes the token {tokens.max()}, but the model has only "
                        f"{self.embeddings} embeddings. Put the model's own tokenizer into its folder."
                    )
                yield tokens
            if total < self.block_size - len(self.bos.of_block):
                raise UserError(
                    f"`data.train`: the stream ends after {total:,} tokens, fewer than one block of "
                    f"`data.block_size` = {self.block_size:,}. Give more text."
                )
