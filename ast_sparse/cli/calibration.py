"""Calibration text for ast-prune and ast-export."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ast_sparse.config import CalibrationConfig
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ast_sparse.data.sources.entries import Entry

_LONGEST = 2048  # tokens of a calibration sequence, even if the model takes more
# The first documents of one file of C4 are enough.
_C4: dict[str, Any] = {
    "path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train[:4000]",
}  # fmt: skip

_SEQUENCE_OPTIONS = (
    click.option(
        "--text-field", default="text", show_default=True, help="Field with the text in a JSONL or parquet file."
    ),
    click.option("--samples", type=int, default=128, show_default=True, help="Sequences to calibrate on."),
    click.option("--seq-len", type=int, help="Tokens in a sequence. Default: the model's positions, at most 2048."),
    click.option("--seed", type=int, default=0, show_default=True, help="Random seed for choosing the sequences."),
)


def sequence_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of both commands that say which sequences of the text are taken."""
    for option in reversed(_SEQUENCE_OPTIONS):  # the one applied last stands first in --help
        command = option(command)
    return command


def calibration_text(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig,
    text_field: str,
    bos: str,
) -> Tensor:
    """The sequences to calibrate on, `[samples, tokens]` int64, from the files of `config` or from C4.

    Raises:
        UserError: a file cannot be read, there is too little text, or the model takes no sequences that long.
    """
    from ast_sparse.data.calibration import calibration_blocks, calibration_samples
    from ast_sparse.data.tokens.bos import find_bos
    from ast_sparse.evaluation.perplexity import max_positions

    limit = max_positions(model_config)
    length = config.seq_len or min(_LONGEST, limit or _LONGEST)
    if limit is not None and length > limit:
        raise UserError(f"--seq-len={length} is longer than the model's {limit:,} positions. Set {limit} or less.")
    entries: tuple[Entry, ...] = config.data or (_C4,)
    found = find_bos(bos, tokenizer, "--bos")
    if (line := found.line(tokenizer, "sequence")) is not None:
        click.echo(line)
    blocks = calibration_blocks(entries, None, text_field, tokenizer, length, "--calibration", bos)
    return calibration_samples(blocks, config, found.of_block)
