"""Compare two tokenizers: whether a student and its teacher have the same tokens."""

from __future__ import annotations

import json
import random
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ast_sparse.errors import UserError

# What decides the tokens of a text. Truncation, padding, special tokens around a text, and decoding may differ.
_PIPELINE = ("normalizer", "pre_tokenizer", "model")
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two blanks,\ttabs,\n\n  line breaks \r\n and a blank at the end ",
    "HTTPServer isn't camelCase: don't, WE'LL, it's, I'm; 1234567890 3.14159 1,000,000 2026-01-31",
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)], \"b\": x != 0}  # TODO\n",
    "naïve café Straße ÅNGSTRÖM ﬁ ½ ① Ａ e\u0301",
    "Привет, мир! 你好，世界。こんにちは 안녕하세요 مرحبا नमस्ते 🙂👩\u200d💻",
)
Renamed: TypeAlias = dict[int, tuple[str, str]]  # what the student and the teacher call a token
_ROLES = ("bos", "eos", "pad", "unk")
_GENERATED = 256  # further probes, of random tokens
_TOKENS = 12  # of each


def difference(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str | None:
    """Why two tokenizers make different ids from a text, or None if they do not.

    Every id that both have must be the same token, except for `renamed_tokens`. Tokens that only one of them has, such
    as tokens added at its end, do not matter. Chat templates, padding, truncation and special tokens around a text are
    not compared.
    """
    ours, theirs = (_by_id(tokenizer) for tokenizer in (student, teacher))
    may_differ = _added(student) & _added(teacher)
    shared = [index for index in sorted(ours.keys() & theirs.keys()) if index not in may_differ]
    for index in shared:
        if ours[index] != theirs[index]:
            return f"token {index} is {theirs[index]!r} in it and {ours[index]!r} in the student's"
    if (pipeline := _pipeline(student)) is not None and pipeline == _pipeline(teacher):
        return None
    for text in (*_PROBES, *_generated(student, shared)):
        tokens, others = (_encode(tokenizer, text) for tokenizer in (student, teacher))
        if tokens != others:
            return f"it makes {_some(others)} from {text[:20]!r}, the student's makes {_some(tokens)}"
    return None


def renamed_tokens(student: PreTrainedTokenizerBase | None, teacher: PreTrainedTokenizerBase | None) -> Renamed:
    """Added tokens that a teacher has under another name, as when a chat model gives reserved tokens a meaning.

    Text without them is the same to both. BOS, EOS and padding have one meaning whatever they are called.

    Returns:
        What the student and the teacher call each such id.
    """
    if student is None or teacher is None:
        return {}
    ours, theirs = _by_id(student), _by_id(teacher)
    ids = [tuple(getattr(each, f"{role}_token_id", None) for each in (student, teacher)) for role in _ROLES]
    same = {our for our, their in ids if our == their}
    added = _added(student) & _added(teacher) & ours.keys() & theirs.keys()
    return {index: (ours[index], theirs[index]) for index in sorted(added - same) if ours[index] != theirs[index]}


def check_text_tokens(tokens: Tensor, renamed: Renamed, named: str) -> None:
    """Check that text contains none of the tokens that a teacher has under another name.

    Args:
        tokens: ids, of any shape.
        named: what messages call the teacher.

    Raises:
        UserError: it contains one.
    """
    if not renamed:
        return
    found = tokens[torch.isin(tokens, torch.tensor(list(renamed), device=tokens.device))]
    if found.numel():
        index = int(found[0])
        ours, theirs = renamed[index]
        raise UserError(
            f"The text has the token {index}, which is {ours!r} to the student and {theirs!r} to {named}. Leave out "
            "text with this token, or choose another teacher."
        )


def check_teacher_tokens(
    student: PreTrainedTokenizerBase | None,
    teacher: PreTrainedTokenizerBase | None,
    rows: int,
    teacher_rows: int,
    named: str,
) -> str | None:
    """Check that the logits of a teacher are for the student's tokens; padding of either vocabulary may differ.

    Args:
        student, teacher: their tokenizers; None if there is none; then the sizes must agree.
        rows, teacher_rows: sizes of their embeddings.
        named: what messages call the teacher.

    Returns:
        A line to print if the tokenizers could not be compared, end text with other tokens, or have other names for
        added tokens.

    Raises:
        UserError: the tokenizers differ, or a model lacks rows for tokens of the teacher's tokenizer.
    """
    of = "Choose a teacher with the student's tokenizer, for instance one of the same family."
    sizes = f"{named} has a vocabulary of {teacher_rows} tokens, the student {rows}"
    if student is None or teacher is None:
        whose = "the teacher" if teacher is None else "the student"
        if rows != teacher_rows:
            raise UserError(f"{sizes}, and {whose} has no tokenizer to compare. {of}")
        return f"{named}: {whose} has no tokenizer to compare; its tokens are assumed to be the student's"
    if (reason := difference(student, teacher)) is not None:
        raise UserError(f"{named} has another tokenizer: {reason}. {of}")
    if rows != teacher_rows and min(rows, teacher_rows) < min(len(student), len(teacher)):
        raise UserError(f"{sizes}, and its tokenizer makes {len(teacher)}. {of}")
    notes = []
    if student.eos_token_id != teacher.eos_token_id:  # as with a base model and its chat model
        notes.append(f"{named} ends text with {teacher.eos_token!r}, the student with {student.eos_token!r}")
    if renamed := renamed_tokens(student, teacher):
        index, (ours, theirs) = next(iter(renamed.items()))
        notes.append(
            f"{named} has other names for {len(renamed)} added tokens; the first is {index}: {theirs!r} there and "
            f"{ours!r} here; text with such tokens is refused"
        )
    return "; ".join(notes) or None


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    found: dict[int, str] = {}
    for token, index in tokenizer.get_vocab().items():
        found[index] = min(token, found.get(index, token))  # a few tokenizers have two names for one id
    return found


def _added(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that were added to the vocabulary learnt from text."""
    return set(getattr(tokenizer, "added_tokens_decoder", {}))


def _pipeline(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The parts of a fast tokenizer that decide the tokens of a text, None for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    return [state.get(part) for part in _PIPELINE]


def _generated(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """Texts of random tokens, so that small vocabularies and other languages are tried too."""
    chance = random.Random(0)
    return [str(tokenizer.decode(chance.choices(tokens, k=_TOKENS))) for _ in range(_GENERATED if tokens else 0)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _some(tokens: list[int]) -> str:
    return f"[{', '.join(map(str, tokens[:6]))}{', …' if len(tokens) > 6 else ''}]"
