"""All results for a text in one pass: perplexity, bits per byte, divergence from a teacher.

Windows may overlap and documents may stay apart (`windows.py`); the default is the published protocol, with the
same perplexity as `evaluate_text`.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.tokens.bos import Bos, find_bos
from ast_sparse.data.tokens.vocabulary import Renamed, check_text_tokens
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import PerplexityResult, check_streams, check_window, text_config
from ast_sparse.evaluation.scoring import Sums, score
from ast_sparse.evaluation.texts import Text
from ast_sparse.evaluation.windows import Stream, Window, cut, tokenise, tokenise_chat

_SAMPLE = 10_000  # characters that both tokenizers must turn into the same tokens


@dataclass(frozen=True, kw_only=True)
class TextResult(PerplexityResult):
    """Results for a text; means are over its scored tokens (`predicted_tokens`).

    `bits_per_byte` is the summed loss of the scored tokens in bits, over the UTF-8 bytes of the text that these tokens
    stand for: a token stands for the bytes from the end of the token before it to its own end. Tokens that are context
    only (the first of a window, or with a stride the first of the text) do not count on either side.
    """

    all_windows: int  # of the text, measured or not
    stride: int | None
    documents: int
    scored_bytes: int | None  # None: the tokenizer has no offsets
    bits_per_byte: float | None
    teacher_kl: float | None  # KL(teacher‖student), nats per token; None without a teacher
    teacher_agreement: float | None  # share of tokens where both find the same one likeliest
    bad_kl_window: int | None = None  # as `bad_window`, for the divergence from the teacher

    def fault(self) -> str | None:
        """As for a perplexity; with a teacher also if only the divergence is not finite."""
        if (fault := super().fault()) is not None or self.bad_kl_window is None:
            return fault
        return (
            f"the divergence from the teacher is not finite in window {self.bad_kl_window:,} of {self.windows:,} "
            f"({self.seq_len:,} tokens each), but the loss is: the teacher is to blame"
        )


def measure_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Any],
    seq_len: int,
    windows: int | None = None,
    *,
    is_chat: bool = False,
    stride: int | None = None,
    join: str = "blank-line",
    bos: str = "auto",
    teacher: nn.Module | None = None,
    renamed: Renamed | None = None,
    progress: bool = True,
    label: str = "Perplexity",
) -> TextResult:
    """Measure a model, and its distance from a teacher, on the windows of a text.

    Both models run in eval mode, without gradients, on their own devices and in their own dtypes; loss and divergence
    are float32, a chunk of positions at a time.

    Args:
        documents: texts, joined as `join` says; or with `is_chat` rows of chat data, which stay separate and in which
            what the assistant says is predicted.
        seq_len: tokens of a window.
        windows: how many to measure, from the first on; None: all.
        stride: tokens between the starts of windows, as in `windows.cut`; None: they do not overlap, and the rest of
            the text is dropped (the published protocol); for separate documents the rest is a shorter window.
        join: as in `windows.tokenise`. With `separate`, windows are cut inside a document, and none crosses documents.
        bos: as in `perplexity`; with `document` or `auto` each document that is tokenised separately gets it.
        teacher: a model with the same tokenizer; its vocabulary may be padded to another size.
        renamed: from `renamed_tokens`: tokens of the teacher that the text must not contain.

    Raises:
        UserError: as `evaluate_text`; a stride not below the window, a token that the teacher does not know.
    """
    started = time.perf_counter()
    config = getattr(model, "config", None)
    check_window(config, seq_len, windows)
    if teacher is not None:
        check_teacher_window(getattr(teacher, "config", None), seq_len)
    join = "separate" if is_chat else join
    found = find_bos(bos, tokenizer, "--bos")
    if is_chat:
        streams = tokenise_chat(tokenizer, documents, "the text", found)
    else:
        streams = tokenise(tokenizer, documents, join, found)
    every = _checked_windows(model, streams, seq_len, stride, join == "separate", found)
    if teacher is not None:
        _check_taught(model, teacher, streams, renamed or {})
    measured = every[:windows]
    pairs = ((window.tokens, window.chosen) for window in measured)
    sums = score(model, pairs, len(measured), teacher=teacher, progress=progress, label=f"{label} at {seq_len:,}")
    if not sums.tokens:
        raise UserError(f"Nothing is predicted in {len(measured):,} windows: they contain only prompts. Measure more.")
    return _result(
        sums,
        [window.scored_bytes for window in measured],
        has_teacher=teacher is not None,
        seq_len=seq_len,
        total_tokens=_count(streams),
        seconds=time.perf_counter() - started,
        all_windows=len(every),
        stride=stride,
        join=join,
        bos=found.of_window,
        documents=len(documents),
    )


def _checked_windows(
    model: nn.Module, streams: Sequence[Stream], seq_len: int, stride: int | None, separate: bool, bos: Bos
) -> list[Window]:
    """All windows of a text; UserError if it does not fill one, or has a token that the model does not know."""
    windows = cut(streams, seq_len, stride, keep_rest=separate, bos=bos)
    is_cut = bool(windows) and (separate or _count(streams) + len(bos.of_block) >= seq_len)
    check_streams(model, streams, seq_len, is_cut=is_cut, front=bos.of_block)
    return windows


def _count(streams: Sequence[Stream]) -> int:
    return sum(len(stream.tokens) for stream in streams)


def measure_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    seq_len: int,
    windows: int | None = None,
    *,
    stride: int | None = None,
    bos: str = "auto",
    teacher: nn.Module | None = None,
    renamed: Renamed | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, TextResult]]:
    """Name and result of every text; after the groups of a file, those of the whole file. As `measure_text`."""
    group: list[TextResult] = []
    for index, text in enumerate(texts):
        limits = [limit for limit in (text.windows, windows) if limit is not None]
        try:
            result = measure_text(
                model,
                tokenizer,
                text.documents,
                seq_len,
                min(limits, default=None),
                stride=stride,
                join=text.join,
                bos=bos,
                is_chat=text.is_chat,
                teacher=teacher,
                renamed=renamed,
                progress=progress,
                label="Perplexity" if len(texts) == 1 else f"Perplexity, {text.name}",
            )
        except UserError as error:
            raise UserError(f"{text.name}: {error}" if len(texts) > 1 else str(error)) from error
        yield text.name, result
        if text.group is not None:
            group.append(result)
            if index + 1 == len(texts) or texts[index + 1].group != text.group:
                yield f"{text.group}, all", total_of(group)
                group = []


def check_tokens(
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    documents: Sequence[Any],
    named: str = "--teacher",
) -> None:
    """Check that a teacher's tokenizer makes the same tokens as the model's from the beginning of a text.

    Args:
        named: what messages call the teacher.

    Raises:
        UserError: it makes different ones.
    """
    texts = map(str, documents)  # rows, for chat data
    sample = "\n".join(islice((text for text in texts if text.strip()), 20))[:_SAMPLE]
    ours, theirs = (each(sample, add_special_tokens=False)["input_ids"] for each in (tokenizer, other))
    if ours != theirs:
        raise UserError(
            f"{named} makes different tokens from the same text. Name a teacher with the model's tokenizer, for "
            "instance the model it was pruned from."
        )


def check_teacher_window(teacher_config: Any, seq_len: int, named: str = "--teacher") -> None:
    """Check that a teacher can take the window.

    Args:
        named: what messages call the teacher.

    Raises:
        UserError: it cannot.
    """
    try:
        check_window(teacher_config, seq_len)
    except UserError as error:
        raise UserError(f"{named}: {error}") from None


def _check_taught(model: nn.Module, teacher: nn.Module, streams: Sequence[Stream], renamed: Renamed) -> None:
    """Raise UserError for a token that the teacher has no embedding for, or that means something else to it."""
    config, other = (getattr(each, "config", None) for each in (model, teacher))
    if config is not None and other is not None:
        ours, theirs = text_config(config).vocab_size, text_config(other).vocab_size
        if theirs < ours and max(max(stream.tokens, default=0) for stream in streams) >= theirs:
            raise UserError(
                f"--teacher has a vocabulary of {theirs} tokens, the model one of {ours}, and the text has tokens "
                "beyond it. Name a teacher with the model's tokenizer, for instance the model it was pruned from."
            )
    for stream in streams if renamed else ():
        check_text_tokens(torch.tensor(stream.tokens), renamed, "--teacher")


def total_of(results: Sequence[TextResult]) -> TextResult:
    """The result over all scored tokens of several texts that were measured in the same way."""
    first = results[0]
    weights = [result.predicted_tokens for result in results]

    def summed(means: Iterable[float | None]) -> float:
        return sum((mean or 0.0) * weight for mean, weight in zip(means, weights, strict=True))

    sums = Sums(
        windows=sum(result.windows for result in results),
        tokens=sum(weights),
        nll=summed(result.mean_nll for result in results),
        kl=summed(result.teacher_kl for result in results),
        agreed=round(summed(result.teacher_agreement for result in results)),
        bad_window=_first([result.bad_window for result in results], results),
        bad_kl_window=_first([result.bad_kl_window for result in results], results),
    )
    return _result(
        sums,
        [result.scored_bytes for result in results],
        has_teacher=first.teacher_kl is not None,
        seq_len=first.seq_len,
        total_tokens=sum(result.total_tokens for result in results),
        seconds=sum(result.seconds for result in results),
        all_windows=sum(result.all_windows for result in results),
        stride=first.stride,
        join=first.join,
        bos=first.bos,
        documents=sum(result.documents for result in results),
    )


def _first(bad: Sequence[int | None], results: Sequence[TextResult]) -> int | None:
    """The first bad window, counted over all texts."""
    before = 0
    for window, result in zip(bad, results, strict=True):
        if window is not None:
            return before + window
        before += result.windows
    return None


def _result(sums: Sums, byte_counts: Sequence[int | None], *, has_teacher: bool, **measured: Any) -> TextResult:
    known = [count for count in byte_counts if count is not None]
    scored_bytes = sum(known) if len(known) == len(byte_counts) else None
    return TextResult(
        perplexity=sums.perplexity,
        mean_nll=sums.nll / sums.tokens,
        windows=sums.windows,
        predicted_tokens=sums.tokens,
        scored_bytes=scored_bytes,
        bits_per_byte=sums.nll / math.log(2) / scored_bytes if scored_bytes else None,
        teacher_kl=sums.kl / sums.tokens if has_teacher else None,
        teacher_agreement=sums.agreed / sums.tokens if has_teacher else None,
        bad_window=sums.bad_window,
        bad_kl_window=sums.bad_kl_window,
        **measured,
    )
