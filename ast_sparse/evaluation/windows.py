"""Text to windows: documents joined and tokenised, tokens cut into windows, and the bytes they stand for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ast_sparse.data.chat import conversation_tokens, uncounted_rows
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SEPARATORS = {"blank-line": "\n\n", "newline": "\n", "space": " ", "none": ""}
JOINS = (*SEPARATORS, "eos", "separate")


@dataclass(frozen=True)
class Stream:
    """Tokens that may share windows: a whole text, or one document where documents stay separate.

    Attributes:
        tokens: token ids.
        ends: how many UTF-8 bytes of the text end with each token, None for a tokenizer without offsets. A token stands
            for the bytes from the end of the token before it to its own end, so that every byte belongs to one token.
        counted: which tokens are predicted, None for all.
    """

    tokens: list[int]
    ends: list[int] | None
    counted: list[bool] | None = None


class Window(NamedTuple):
    """Tokens `begin` to `end` of a stream, of which the last `scored` are predicted and counted."""

    stream: Stream
    begin: int
    end: int
    scored: int

    @property
    def tokens(self) -> list[int]:
        return self.stream.tokens[self.begin : self.end]

    @property
    def chosen(self) -> int | Tensor:
        """What is predicted, as `scoring.score` takes it."""
        if self.stream.counted is None:
            return self.scored
        counted = torch.tensor(self.stream.counted[self.begin + 1 : self.end], dtype=torch.bool)
        counted[: len(counted) - self.scored] = False
        return counted

    @property
    def scored_bytes(self) -> int | None:
        """UTF-8 bytes that the scored tokens stand for, None without offsets."""
        ends = self.stream.ends
        return None if ends is None else ends[self.end - 1] - ends[self.end - self.scored - 1]


def tokenise(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], join: str = "blank-line") -> list[Stream]:
    """Tokenise documents without special tokens.

    Args:
        join: `blank-line`, `newline`, `space`, `none`: what stands between documents of the one text. `eos`: documents
            are tokenised one by one, with the end-of-text token between them; it is predicted and stands for no byte.
            `separate`: every document is a stream of its own.

    Raises:
        UserError: `eos` and the tokenizer has no such token.
    """
    if join in SEPARATORS:
        return _encode(tokenizer, [SEPARATORS[join].join(documents)])
    streams = _encode(tokenizer, list(documents))
    if join == "separate":
        return streams
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError(
            "--join eos: the tokenizer has no end-of-text token. Join by blank-line, newline, space or none."
        )
    return [_joined_by(eos, streams)]


def tokenise_chat(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], name: str) -> list[Stream]:
    """Conversations, a stream each, of which what the assistant says is predicted.

    Raises:
        UserError: as `data.chat.tokenise_conversations`.
    """
    found = list(conversation_tokens(rows, tokenizer, name))
    if line := uncounted_rows(np.array([len(ids) for ids, _ in found]), name):
        logger.warning(line)
    return [Stream(ids.tolist(), None, (labels != IGNORE_INDEX).tolist()) for ids, labels in found]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Stream]:
    # verbose=False: a text is longer than the model's window by intent, it is cut afterwards.
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


def _joined_by(token: int, streams: list[Stream]) -> Stream:
    tokens: list[int] = []
    ends: list[int] | None = [] if all(stream.ends is not None for stream in streams) else None
    for index, stream in enumerate(streams):
        count = ends[-1] if ends else 0
        between = [token] if index else []
        tokens += between + stream.tokens
        if ends is not None and stream.ends is not None:
            ends += [count] * len(between) + [count + end for end in stream.ends]
    return Stream(tokens, ends)


def cut(streams: Sequence[Stream], seq_len: int, stride: int | None = None, *, keep_rest: bool = False) -> list[Window]:
    """Cut every stream into windows of `seq_len` tokens.

    Args:
        stride: None: windows do not overlap, the first token of each is context only, and the rest of a stream that
            fills no window is dropped. Otherwise windows begin `stride` tokens apart, each scores the tokens after the
            end of the one before it, and so all tokens of a stream but its first are scored once; the last window ends
            with the stream and may be shorter.
        keep_rest: with no stride, keep the rest as a shorter window.

    Raises:
        UserError: `stride` is not between 1 and `seq_len` − 1.
    """
    if stride is not None and not 1 <= stride < seq_len:
        raise UserError(
            f"--stride {stride} must be between 1 and {seq_len - 1}, a token less than the window of {seq_len} tokens. "
            "Leave it out for windows that do not overlap."
        )
    windows = []
    for stream in streams:
        length = len(stream.tokens)
        spans = _apart(length, seq_len, keep_rest) if stride is None else _overlapping(length, seq_len, stride)
        windows += [Window(stream, *span) for span in spans]
    return windows


def _apart(length: int, seq_len: int, keep_rest: bool) -> Iterator[tuple[int, int, int]]:
    for begin in range(0, length, seq_len):
        end = min(begin + seq_len, length)
        if end - begin == seq_len or (keep_rest and end - begin > 1):
            yield begin, end, end - begin - 1


def _overlapping(length: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    done = 1  # nothing predicts the first token
    for begin in range(0, length, stride):
        if done >= length:
            return
        end = min(begin + seq_len, length)
        yield begin, end, end - done
        done = end
