"""From text to windows: join and tokenise documents, cut tokens into windows, count the bytes they stand for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ast_sparse.data.tokens.bos import NO_BOS, Bos
from ast_sparse.data.tokens.chat import conversation_tokens, uncounted_rows
from ast_sparse.data.tokens.shard_writer import missing
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SEPARATORS = {"blank-line": "\n\n", "newline": "\n", "space": " ", "none": ""}
JOINS = (*SEPARATORS, "eos", "separate")


@dataclass(frozen=True)
class Stream:
    """Tokens that may share windows: a whole text, or one document if documents stay separate.

    Attributes:
        tokens: token ids.
        ends: UTF-8 bytes of the text up to the end of each token, None for a tokenizer without offsets. A token stands
            for the bytes from the end of the token before it to its own end, so that every byte belongs to one token.
        counted: which tokens are predicted, None for all.
    """

    tokens: list[int]
    ends: list[int] | None
    counted: list[bool] | None = None


class Window(NamedTuple):
    """Tokens `begin` to `end` of a stream after those of `front`; the last `scored` are predicted and counted."""

    stream: Stream
    begin: int
    end: int
    scored: int
    front: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return [*self.front, *self.stream.tokens[self.begin : self.end]]

    @property
    def chosen(self) -> int | Tensor:
        """What is predicted, as `scoring.score` takes it."""
        if self.stream.counted is None:
            return self.scored
        of_stream = self.stream.counted[self.begin : self.end]
        counted = torch.tensor([*(False for _ in self.front), *of_stream][1:], dtype=torch.bool)
        counted[: len(counted) - self.scored] = False
        return counted

    @property
    def scored_bytes(self) -> int | None:
        """UTF-8 bytes that the scored tokens stand for, None without offsets."""
        ends = self.stream.ends
        if ends is None:
            return None
        before = self.end - self.scored - 1
        return ends[self.end - 1] - (ends[before] if before >= 0 else 0)


def tokenise(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], join: str = "blank-line", bos: Bos = NO_BOS
) -> list[Stream]:
    """Tokenise documents, without special tokens except those of `bos`.

    Args:
        join: `blank-line`, `newline`, `space`, `none`: what is put between documents to join them into one text. `eos`:
            documents are tokenised one by one, with the end-of-text token between them; it is predicted and stands for
            no byte. `separate`: every document is its own stream.
        bos: what goes before each document, or before the whole text if documents are joined before they are tokenised.
            It is not predicted and stands for no byte. `cut` puts it before windows.

    Raises:
        UserError: `join` is `eos` and the tokenizer has no such token.
    """
    texts = [SEPARATORS[join].join(documents)] if join in SEPARATORS else list(documents)
    streams = [_begun(stream, bos.of_document) for stream in _encode(tokenizer, texts)]
    if join == "eos":
        eos = tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise UserError(
                "--join eos: the tokenizer has no end-of-text token. Join by blank-line, newline, space or none."
            )
        streams = [_joined_by(eos, streams)]
    return [_all_counted(stream) for stream in streams]


def tokenise_chat(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], name: str, bos: Bos = NO_BOS
) -> list[Stream]:
    """Conversations, one stream each; what the assistant says is predicted.

    Chat templates write their own BOS; prompts and completions that are plain text get that of `bos`.

    Raises:
        UserError: as `tokenise_conversations`.
    """
    found = list(conversation_tokens(rows, tokenizer, name, bos.of_document))
    if line := uncounted_rows(np.array([len(ids) for ids, _ in found]), name):
        logger.warning(line)
    return [Stream(ids.tolist(), None, (labels != IGNORE_INDEX).tolist()) for ids, labels in found]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Stream]:
    # verbose=False: a text may be longer than the model's window; it is cut afterwards.
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    tokens: list[list[int]] = encoded["input_ids"]
    if not tokenizer.is_fast:
        return [Stream(ids, None) for ids in tokens]
    offsets: list[list[tuple[int, int]]] = encoded["offset_mapping"]
    return [Stream(ids, _byte_ends(text, spans)) for ids, text, spans in zip(tokens, texts, offsets, strict=True)]


def _byte_ends(text: str, spans: list[tuple[int, int]]) -> list[int]:
    """Bytes of the text up to the end of each token, whose spans are in characters; the last token ends the text."""
    ends = []
    characters = count = 0
    for _, end in spans:
        if end > characters:  # a character of several tokens belongs to the first of them
            count += len(text[characters:end].encode())
            characters = end
        ends.append(count)
    if ends:  # offsets may leave out white space at the end
        ends[-1] = count + len(text[characters:].encode())
    return ends


def _begun(stream: Stream, begin: tuple[int, ...]) -> Stream:
    """A document with BOS before it, which is not predicted; an empty one stays empty."""
    begin = missing(begin, stream.tokens)
    if not begin or not stream.tokens:
        return stream
    ends = None if stream.ends is None else [*(0 for _ in begin), *stream.ends]
    counted = [*(False for _ in begin), *(True for _ in stream.tokens)]
    return Stream([*begin, *stream.tokens], ends, counted)


def _all_counted(stream: Stream) -> Stream:
    """Drop the mask if all it says is that the first token is not predicted."""
    return Stream(stream.tokens, stream.ends) if stream.counted and all(stream.counted[1:]) else stream


def _joined_by(token: int, streams: list[Stream]) -> Stream:
    tokens: list[int] = []
    counted: list[bool] = []
    ends: list[int] | None = [] if all(stream.ends is not None for stream in streams) else None
    for index, stream in enumerate(streams):
        count = ends[-1] if ends else 0
        between = [token] if index else []
        tokens += between + stream.tokens
        counted += [True] * len(between) + (stream.counted or [True] * len(stream.tokens))
        if ends is not None and stream.ends is not None:
            ends += [count] * len(between) + [count + end for end in stream.ends]
    return Stream(tokens, ends, counted)


def cut(
    streams: Sequence[Stream],
    seq_len: int,
    stride: int | None = None,
    *,
    keep_rest: bool = False,
    bos: Bos = NO_BOS,
) -> list[Window]:
    """Cut every stream into windows of `seq_len` tokens.

    Args:
        stride: None: windows do not overlap, the first token of each is context only, and the rest of a stream that
            does not fill a window is dropped. Otherwise windows begin `stride` tokens apart, each scores the tokens
            after the end of the one before it, so every token of a stream but the first is scored once. The last window
            ends with the stream and may be shorter.
        keep_rest: with no stride, keep the rest as a shorter window.
        bos: if it goes before every window, it is context only: the rest of `seq_len` is text, and all of that is
            predicted. A window that already begins with it, from a chat template, does not get a second one.

    Raises:
        UserError: `stride` is not between 1 and `seq_len` − 1.
    """
    longest = seq_len - max(1, len(bos.of_block))
    if stride is not None and not 1 <= stride <= longest:
        raise UserError(
            f"--stride {stride} must be between 1 and {longest} for windows of {seq_len} tokens. "
            "Leave it out for windows that do not overlap."
        )
    windows = []
    for stream in streams:
        windows += list(_cut(stream, seq_len, stride, keep_rest, bos))
    return windows


def _cut(stream: Stream, seq_len: int, stride: int | None, keep_rest: bool, bos: Bos) -> Iterator[Window]:
    length, begin, done = len(stream.tokens), 0, 0
    while begin < length and (stride is None or done < length):
        before = bos.before_block(stream.tokens[begin : begin + len(bos.of_block)])
        first = begin if before else begin + 1  # that is predicted
        end = min(begin + seq_len - len(before), length)
        is_whole = len(before) + end - begin == seq_len
        scored = end - max(done, first)
        if scored > 0 and (is_whole or keep_rest or stride is not None):
            yield Window(stream, begin, end, scored, before)
        begin, done = (end if stride is None else begin + stride), end
