"""Tokenise texts of any length within bounded memory: a tokenizer needs about 130 bytes per character."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ast_sparse.errors import UserError

CHARACTERS_PER_CALL = 1_000_000
LONGEST_PIECE = 16_000_000  # characters of a text that cannot be cut anywhere
_AROUND = 1000  # characters on each side of a cut that are tokenised with and without it
_SOUGHT = 20_000  # characters before the end of a piece in which a cut is looked for
_TRIED = 16  # places that are tried there
_PLACE = re.compile(r"(?<=\S)[ \n](?=\S)")

Encode = Callable[[list[str]], list[list[int]]]


def encoded(encode: Encode, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """The tokens `[tokens]` of each text, as `encode` returns them for the whole text.

    Long texts are tokenised in pieces. They are cut where that changes no token around the cut: before a space or a
    line break, or in place of it for tokenizers that put a space before every text.

    Raises:
        UserError: a text is too long to be tokenised in one go and cannot be cut.
    """
    for group in _groups(texts):
        if len(group[0]) <= CHARACTERS_PER_CALL:
            yield from (np.asarray(ids, dtype=np.int64) for ids in encode(group))
        else:
            pieces = [np.asarray(encode([piece])[0], dtype=np.int64) for piece in _pieces(encode, group[0])]
            yield np.concatenate(pieces)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in groups that a tokenizer takes at once; one that is too long for that is alone."""
    group: list[str] = []
    characters = 0
    for text in texts:
        if group and characters + len(text) > CHARACTERS_PER_CALL:
            yield group
            group, characters = [], 0
        group.append(text)
        characters += len(text)
    if group:
        yield group


def _pieces(encode: Encode, text: str) -> Iterator[str]:
    start = end = 0
    while len(text) - start > CHARACTERS_PER_CALL:
        end = max(end, start) + CHARACTERS_PER_CALL
        cut = _cut(encode, text, start, min(end, len(text)))
        if cut is not None:
            yield text[start : cut[0]]
            start = end = cut[1]
        elif min(end, len(text)) - start > LONGEST_PIECE:
            raise UserError(
                f"A document of {len(text):,} characters, {text[:40]!r} …, is too long to be tokenised in one go, and "
                "cutting it would change its tokens. Split it, or leave it out."
            )
        elif end >= len(text):
            break
    yield text[start:]


def _cut(encode: Encode, text: str, start: int, end: int) -> tuple[int, int] | None:
    """Where a piece from `start` to at most `end` may stop and the next may begin; None if there is no such place."""
    low = max(start + 1, end - _SOUGHT)
    places = [low + match.start() for match in _PLACE.finditer(text[low:end])]
    for place in reversed(places[-_TRIED:]):
        left, right = text[max(start, place - _AROUND) : place], text[place : place + _AROUND]
        whole = encode([left + right])[0]
        for skipped in (0, 1):
            one, other = encode([left, right[skipped:]])
            if [*one, *other] == whole:
                return place, place + skipped
    return None
