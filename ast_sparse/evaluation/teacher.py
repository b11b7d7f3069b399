"""What `ast-eval` checks of a `--teacher`: that it takes the window, and has the tokens of the model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from ast_sparse.data.tokens.vocabulary import check_teacher_tokens
from ast_sparse.errors import UserError
from ast_sparse.evaluation.measure import check_teacher_window
from ast_sparse.evaluation.perplexity import text_config
from ast_sparse.storage.locate import load_tokenizer


def check_teacher(
    name: str,
    teacher_config: Any,
    config: Any,
    seq_len: int,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
) -> str | None:
    """Check a teacher against a model and its tokenizer, before weights are loaded.

    Args:
        name: the teacher's name.
        config, tokenizer: the model's.

    Returns:
        A line to print if the teacher has no tokenizer to compare.

    Raises:
        UserError: the window is too long for it, or its tokens are not the model's.
    """
    named = f"--teacher {name}"
    check_teacher_window(teacher_config, seq_len, named)
    try:
        other = load_tokenizer(name, trust_remote_code=trust_remote_code)
    except UserError:
        other = None  # its folder has none
    rows, teacher_rows = (text_config(each).vocab_size for each in (config, teacher_config))
    return check_teacher_tokens(tokenizer, other, rows, teacher_rows, named)
