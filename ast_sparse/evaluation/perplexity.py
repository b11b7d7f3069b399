"""Perplexity by the published protocol, and the WikiText-2 text it is reported on.

The text is tokenised as one stream, by default as the tokenizer itself does it (BOS at its start, or none), and cut
into windows that do not overlap; the remainder is dropped. Each window of `seq_len` tokens predicts `seq_len - 1`; the
perplexity is exp of the mean loss over all of them (paper Sec. 7). A longer window gives a lower perplexity, so a
perplexity means nothing without its window length.
"""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ast_sparse.data.tokens.bos import find_bos
from ast_sparse.distillation.logits import IGNORE_INDEX
from ast_sparse.errors import UserError, one_line
from ast_sparse.evaluation.scoring import score
from ast_sparse.evaluation.windows import Stream, cut, tokenise

_PUBLISHED_WINDOW = {"gpt2": 1024, "opt": 2048}
_LLAMA2_WINDOW = 4096
_OTHER_WINDOW = 2048
NOT_FINITE = "Check the weights for values that are not finite, or load the model in float32."
# What configs call the longest sequence: most families, GPT-2, MPT, and then those whose code comes with the model.
_POSITIONS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions",
    "max_sequence_length", "max_seq_length", "max_seqlen", "seq_length", "context_length", "model_max_length",
)  # fmt: skip
# Their configs name the whole table, whose first rows, up to that of the padding token, belong to no position.
_POSITIONS_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """A perplexity and what it was measured on."""

    perplexity: float
    mean_nll: float  # nats per predicted token
    seq_len: int
    windows: int
    predicted_tokens: int
    total_tokens: int  # of the whole text, measured or not
    seconds: float
    join: str | None = None  # as in `windows.tokenise`; None, as for `bos`, if the tokens were given
    bos: str | None = None  # where text had BOS: none, document or window
    bad_window: int | None = None  # first measured window, from 1, whose loss is not finite; None: all are

    def fault(self) -> str | None:
        """What makes the result useless, for an error or a warning; None if the loss of every window is finite.

        A finite loss whose exp is too large for a float is not a fault: its perplexity is inf.
        """
        if self.bad_window is None:
            return None
        return (
            f"the loss of window {self.bad_window:,} of {self.windows:,} ({self.seq_len:,} tokens each) is not finite, "
            "and neither is the perplexity"
        )


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text_or_rows: str | Sequence[str],
    seq_len: int,
    windows: int | None = None,
    bos: str = "auto",
) -> float:
    """Perplexity of a causal language model on a text; `evaluate_text` returns the details as well.

    A loss that is not finite results in nan or inf, and a warning that names the window.

    Args:
        text_or_rows: the text, or rows to be joined by a blank line.
        seq_len: tokens of a window.
        windows: how many to measure, from the first on; None: all.
        bos: `auto`: what the tokenizer does, BOS at the start of the text or none; `none`; `document`: at the start of
            the text; `window`: at the start of each window, as part of its `seq_len`. It is not predicted.

    Raises:
        UserError: as `evaluate_text`.
    """
    result = evaluate_text(model, tokenizer, text_or_rows, seq_len, windows, bos=bos)
    if fault := result.fault():
        warnings.warn(f"{fault[0].upper()}{fault[1:]}. {NOT_FINITE}", stacklevel=2)
    return result.perplexity


def evaluate_text(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text_or_rows: str | Sequence[str],
    seq_len: int,
    windows: int | None = None,
    *,
    bos: str = "auto",
    shared: bool = False,
    progress: bool = True,
    label: str = "Perplexity",
) -> PerplexityResult:
    """Perplexity over non-overlapping windows of the text; arguments as in `perplexity`.

    The model runs in eval mode, without gradients, on its own device and in its own dtype; the loss is float32.
    Afterwards every module is back in its old mode. `label` is shown before the progress bar. With `shared`, and always
    for a model that FSDP2 has sharded, all processes call this, share the windows and return the same result.

    Raises:
        UserError: a text shorter than one window, a window below two tokens or beyond the model's positions, a token
            that the model does not know.
    """
    documents = [text_or_rows] if isinstance(text_or_rows, str) else text_or_rows
    check_window(getattr(model, "config", None), seq_len, windows)
    found = find_bos(bos, tokenizer, "bos")
    join = "blank-line"  # the published protocol
    streams = tokenise(tokenizer, documents, join, found)
    cuts = cut(streams, seq_len, bos=found)[:windows]
    check_streams(model, streams, seq_len, is_cut=bool(cuts), front=found.of_block)
    pairs = ((window.tokens, window.chosen) for window in cuts)
    total = sum(len(stream.tokens) for stream in streams)
    shown: dict[str, Any] = {"shared": shared, "progress": progress, "label": label}
    return _measure(
        model, pairs, len(cuts), seq_len=seq_len, total_tokens=total, join=join, bos=found.of_window, **shown
    )


def check_streams(
    model: nn.Module, streams: Sequence[Stream], seq_len: int, *, is_cut: bool, front: tuple[int, ...] = ()
) -> None:
    """Check that the text fills a window (`is_cut`) and that the model knows its tokens and those before each window.

    Raises:
        UserError: a text shorter than a window, or a token without an embedding.
    """
    if not is_cut:
        raise UserError(
            f"The text has {sum(len(stream.tokens) for stream in streams):,} tokens, fewer than one window of "
            f"{seq_len:,} (`seq_len`). Give a longer text or a shorter window."
        )
    config = getattr(model, "config", None)
    embeddings = None if config is None else getattr(text_config(config), "vocab_size", None)
    largest = max(0, *front, *(max(stream.tokens, default=0) for stream in streams))
    if embeddings is not None and largest >= embeddings:
        raise UserError(
            f"The tokenizer makes the token {largest}, but the model has {embeddings} embeddings. They do not match: "
            "use the model's own tokenizer."
        )


def evaluate_blocks(
    model: nn.Module,
    blocks: Sequence[Any],
    windows: int | None = None,
    *,
    shared: bool = False,
    progress: bool = True,
    label: str = "Perplexity",
) -> PerplexityResult:
    """Perplexity over blocks that are tokenised already, each one a window.

    Args:
        blocks: a data set or list of rows of one length: `{"input_ids": ...}`, lists of token ids, or int64 tensors.
            In rows with `labels` (chat data) only those that are not −100 are predicted.
        windows: how many to measure, from the first on; None: all.
        shared: as in `evaluate_text`.

    Raises:
        UserError: no blocks, blocks of different lengths, a window the model cannot take, or nothing to predict.
    """
    if not len(blocks):
        raise UserError("There are no held-out blocks to measure perplexity on. Set `data.eval_share` or `data.eval`.")
    seq_len = len(_token_ids(blocks[0]))
    check_window(getattr(model, "config", None), seq_len, windows)
    count = min(len(blocks), windows or len(blocks))
    total = len(blocks) * seq_len
    pairs = _pairs(blocks, count, seq_len)
    shown: dict[str, Any] = {"shared": shared, "progress": progress, "label": label}
    return _measure(model, pairs, count, seq_len=seq_len, total_tokens=total, **shown)


def _pairs(blocks: Sequence[Any], count: int, seq_len: int) -> Iterator[tuple[Any, int | Tensor]]:
    """The first `count` blocks, one at a time, all of one length, and which of their tokens are predicted."""
    for index in range(count):
        block = blocks[index]
        ids = _token_ids(block)
        if len(ids) != seq_len:
            raise UserError(f"Block {index} has {len(ids)} tokens, block 0 has {seq_len}: pack to one length.")
        labels = block.get("labels") if isinstance(block, Mapping) else None
        yield ids, seq_len - 1 if labels is None else torch.as_tensor(labels)[1:] != IGNORE_INDEX


def _token_ids(block: Any) -> Any:
    return block["input_ids"] if isinstance(block, Mapping) else block


def check_window(model_config: Any, seq_len: int, windows: int | None = None) -> None:
    """Check a window length against a model's config, before text or weights are loaded.

    Raises:
        UserError: `seq_len` below 2 or above the model's positions, or `windows` below 1.
    """
    if seq_len < 2:
        raise UserError(f"A window of {seq_len} tokens (`seq_len`) predicts nothing: it must be at least 2.")
    if windows is not None and windows < 1:
        raise UserError(f"The number of windows must be at least 1, not {windows}.")
    limit = None if model_config is None else max_positions(model_config)
    if limit is not None and seq_len > limit:
        raise UserError(
            f"A window of {seq_len:,} tokens (`seq_len`) is longer than the model's {limit:,} positions. "
            f"Set at most {limit:,}."
        )


def max_positions(model_config: Any) -> int | None:
    """Longest sequence a model takes, by its config; None if it sets no limit (Mamba, BLOOM, Falcon with ALiBi).

    Scaled rotary positions count if they exceed what the config names (`linear`, `dynamic`, `yarn`, by their factor).
    """
    config = text_config(model_config)
    named = _named_positions(config)
    if named is None or getattr(config, "alibi", None) is True:
        return None
    return max(named, _scaled_positions(config))


def named_positions(model_config: Any) -> int | None:
    """As `max_positions`, without the scaling of rotary positions: what a model is usually measured at."""
    return _named_positions(text_config(model_config))


def _named_positions(config: Any) -> int | None:
    for name in _POSITIONS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            padding = getattr(config, "pad_token_id", None)
            reserved = (padding or 0) + 1 if config.model_type in _POSITIONS_AFTER_PADDING else 0
            return value - reserved
    return None


def _scaled_positions(config: Any) -> int:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in ("linear", "dynamic", "yarn"):
        return 0  # for others the named positions include it
    factor = rope.get("factor")
    before = rope.get("original_max_position_embeddings") or _named_positions(config)
    return int(before * factor) if before and isinstance(factor, int | float) else 0


def default_seq_len(model_config: Any) -> int:
    """The window of the published results for the model's family (paper Sec. 7), at most the model's positions.

    GPT-2 1024, OPT 2048, LLaMA2 4096: a `llama` with exactly 4096 positions, as LLaMA2 and its fine-tunes have. For all
    others, later LLaMAs included, 2048, the usual choice in the pruning literature.
    """
    config = text_config(model_config)
    limit = _named_positions(config)
    is_llama2 = config.model_type == "llama" and limit == _LLAMA2_WINDOW
    window = _LLAMA2_WINDOW if is_llama2 else _PUBLISHED_WINDOW.get(config.model_type, _OTHER_WINDOW)
    return window if limit is None else min(window, limit)


def text_config(model_config: Any) -> Any:
    """The part of a config that describes the language model."""
    if not hasattr(model_config, "get_text_config"):
        return model_config
    try:
        return model_config.get_text_config()
    except ValueError:  # MusicGen has a text encoder besides its decoder
        return model_config.get_text_config(decoder=True)


def _measure(
    model: nn.Module,
    pairs: Iterable[tuple[Any, int | Tensor]],
    count: int,
    *,
    seq_len: int,
    total_tokens: int,
    shared: bool,
    progress: bool,
    label: str,
    join: str | None = None,
    bos: str | None = None,
) -> PerplexityResult:
    started = time.perf_counter()
    sums = score(model, pairs, count, shared=shared, progress=progress, label=f"{label} at {seq_len:,}")
    if not sums.tokens:
        raise UserError(f"Nothing in {count:,} held-out blocks is predicted: all labels are −100. Hold out more.")
    return PerplexityResult(
        perplexity=sums.perplexity,
        mean_nll=sums.nll / sums.tokens,
        seq_len=seq_len,
        windows=sums.windows,
        predicted_tokens=sums.tokens,
        total_tokens=total_tokens,
        seconds=time.perf_counter() - started,
        join=join,
        bos=bos,
        bad_window=sums.bad_window,
    )


def wikitext2_rows(split: str = "test", data_dir: str | Path | None = None, field: str = "--data-dir") -> list[str]:
    """Rows of WikiText-2 raw; the published text is these joined by a blank line.

    Args:
        split: `test` (what is reported) or `validation`.
        data_dir: a folder with `wiki.test.raw` (`wiki.valid.raw`), or such a file itself; None: from the hub.
        field: the setting `data_dir` comes from, for messages.

    Returns:
        A row for every line: blank lines are "", the others keep their newline.

    Raises:
        UserError: an unknown split, no such file, or the hub cannot be reached.
    """
    names = {"test": "wiki.test.raw", "validation": "wiki.valid.raw"}
    if split not in names:
        raise UserError(f"WikiText-2 is evaluated on its test or validation split, not `{split}`.")
    if data_dir is None:
        return _hub_rows(split, field)
    path = Path(data_dir).expanduser()
    file = path / names[split] if path.is_dir() else path
    try:
        # newline="\n" leaves lines as they are; str.splitlines would also cut at Unicode separators inside them.
        with file.open(encoding="utf-8", newline="\n") as lines:
            rows = [line if line.strip() else "" for line in lines]
    except FileNotFoundError:
        raise UserError(f"No {names[split]} in `{field}` {path}. Name its folder, or the file itself.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}. Copy it again.") from error
    if not any(rows):
        raise UserError(f"{file} is empty. Name the file of WikiText-2 in `{field}`.")
    return rows


def _hub_rows(split: str, field: str) -> list[str]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        return list(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise UserError(
            f"WikiText-2 cannot be loaded from the hub ({one_line(error, 200)}). Without a network, set `{field}` to a "
            "folder with wiki.test.raw."
        ) from error
