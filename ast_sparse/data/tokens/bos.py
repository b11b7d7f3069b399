"""Where text gets a BOS token: nowhere, before each document, or before each block (of training) or window.

The tokens that a tokenizer itself puts before a text are its BOS. They are found by encoding a few texts, and there may
be several of them (GLM). Chat templates write their own BOS, which is neither doubled nor removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from ast_sparse.config.data import BOS_CHOICES
from ast_sparse.data.tokens.shard_writer import missing
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from ast_sparse.data.tokens.shards import ShardFolder

Place = Literal["none", "document", "block"]

_TRIED = ("a", "the", "1", ".")


@dataclass(frozen=True)
class Bos:
    """What goes before text, and where.

    Attributes:
        place: `none`, `document` or `block`; in an evaluation a block is a window.
        tokens: BOS, which is several tokens for a few tokenizers; empty if the place is `none`.
        own: what the tokenizer itself puts before a text, for messages.
        is_end: BOS is also the token that ends documents (OPT).
    """

    place: Place = "none"
    tokens: tuple[int, ...] = ()
    own: tuple[int, ...] = ()
    is_end: bool = False

    @property
    def of_document(self) -> tuple[int, ...]:
        """The tokens before each document."""
        return self.tokens if self.place == "document" else ()

    @property
    def of_block(self) -> tuple[int, ...]:
        """The tokens before each block or window."""
        return self.tokens if self.place == "block" else ()

    @property
    def of_window(self) -> str:
        """The place in an evaluation: none, document or window."""
        return "window" if self.place == "block" else self.place

    def before_block(self, ids: Sequence[int] | np.ndarray) -> tuple[int, ...]:
        """The tokens to put before a block or window; none if its text, a rendered chat, begins with them.

        If BOS also ends documents, a block that begins with it may begin with the end of one, so BOS is put before it.
        """
        return self.of_block if self.is_end else missing(self.of_block, ids)

    def line(self, tokenizer: PreTrainedTokenizerBase, unit: str = "block") -> str | None:
        """What reports say about it; None if neither the tokenizer nor the setting puts anything before text."""
        if not (self.tokens or self.own):
            return None
        name = "".join(tokenizer.convert_ids_to_tokens(list(self.tokens or self.own)))
        if self.place == "none":
            return f"BOS: none; the tokenizer would put {name} before each document"
        return f"BOS: {name} before each {'document' if self.place == 'document' else unit}"


NO_BOS = Bos()


def find_bos(choice: str, tokenizer: PreTrainedTokenizerBase, field: str = "data.bos") -> Bos:
    """What a setting means for a tokenizer.

    Args:
        choice: one of `BOS_CHOICES`. `auto` is what the tokenizer does when it is called with a text: BOS before each
            document, or none. `window` is another word for `block`.
        field: the setting, for messages.

    Raises:
        UserError: an unknown choice, or BOS is asked for and the tokenizer has none.
    """
    if choice not in BOS_CHOICES:
        raise UserError(f"{field}={choice!r} is not one of {', '.join(BOS_CHOICES)}. Correct it.")
    own = own_bos(tokenizer)
    if choice == "auto":
        return Bos("document", own, own) if own else NO_BOS
    if choice == "none":
        return Bos(own=own)
    tokens = own
    if not own:
        token = getattr(tokenizer, "bos_token_id", None)
        if token is None:
            raise UserError(
                f"{field}={choice!r}: the tokenizer of {str(tokenizer.name_or_path)!r} has no BOS token. Set "
                f"{field} to none or auto, or set `bos_token` in its tokenizer_config.json."
            )
        tokens = (int(token),)
    is_end = tokens == (tokenizer.eos_token_id,)
    return Bos("document" if choice == "document" else "block", tokens, own, is_end)


def bos_note(choice: str, tokenizer: PreTrainedTokenizerBase, field: str = "--bos") -> str | None:
    """A note for a table of perplexities, if the tokenizer puts BOS before text but windows do not begin with it.

    Args:
        choice: as in `find_bos`.
        field: the option or the setting that has it, for messages.

    Raises:
        UserError: as `find_bos`.
    """
    found = find_bos(choice, tokenizer, field)
    if not found.own or found.place == "block":
        return None
    where = "only at the start of each document or text" if found.place == "document" else "nowhere"
    setting = f"{field} " if field.startswith("--") else f"{field}="
    return (
        f"BOS is {where} ({setting}{choice}). Models that need it in every window, such as Gemma, need {setting}window."
    )


def own_bos(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before a text; those it puts after it do not count."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
    if not hasattr(tokenizer, "encode"):
        return ()
    special = set(tokenizer.all_special_ids)
    size = len(tokenizer)
    texts = [*_TRIED, *(str(tokenizer.decode([index])) for index in range(size // 2, size, max(1, size // 16)))]
    for text in texts:
        plain, whole = (list(tokenizer.encode(text, add_special_tokens=around)) for around in (False, True))
        if not plain or special & set(plain):  # unknown tokens look like those that are put before the text
            continue
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
    return ()


def bos_of_shards(fields: Sequence[str], folders: Sequence[ShardFolder], bos: Bos, choice: str) -> Bos:
    """What blocks of shards begin with: `auto` takes documents as they were written, if all agree.

    Raises:
        UserError: the documents have BOS and the setting asks for none, or the other way round.
    """
    expected = tuple(folders[0].manifest.bos) if choice == "auto" else bos.of_document
    for field, folder in zip(fields, folders, strict=True):
        found = tuple(folder.manifest.bos)
        if found == expected:
            continue
        has = f"begin their documents with BOS {list(found)}" if found else "have no BOS"
        other = f"those of {folders[0].name} differ" if choice == "auto" else f"data.bos is {choice}"
        option = "document" if expected else "none"
        raise UserError(
            f"`{field}`: the shards of {folder.name} {has}, and {other}. Make them again with ast-data prepare --bos "
            f"{option}, or set data.bos to match them."
        )
    if choice != "auto":
        return bos
    return Bos("document", expected, bos.own) if expected else Bos(own=bos.own)
