"""What SparseTrainer is given, checked before training: models, an optimizer, data sets."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ast_sparse.data.build import pack_dataset
from ast_sparse.data.sources.conversations import chat_columns
from ast_sparse.data.tokens.vocabulary import Renamed, check_teacher_tokens, check_text_tokens, renamed_tokens
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import max_positions
from ast_sparse.storage.locate import load_tokenizer

_LONGEST_BLOCK = 1024  # where nothing was asked for


def check_model(model: PreTrainedModel) -> None:
    """Raise UserError for half-precision weights, or a loss of the model's own that (4) has no place for."""
    if getattr(model.config, "output_router_logits", False):
        raise UserError(
            "config.output_router_logits=True asks for the router's auxiliary loss, which is not part of (4). "
            "Set it to False."
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64) and parameter.is_floating_point():
            raise UserError(
                f"`{name}` is {parameter.dtype}: half-precision master weights swallow the mask decay and small steps. "
                "Load the model with dtype=torch.float32, and set bf16=True in TrainingArguments for speed."
            )


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: PreTrainedModel) -> None:
    """Raise UserError unless an optimizer that was built by hand holds every trained parameter, SLoRB's included."""
    if optimizer is None:
        return
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in held:
            raise UserError(
                f"optimizers[0] does not hold `{name}`, which would never be trained. Pass None: SparseTrainer builds "
                "its own SparseAdamW."
            )


def check_vocabularies(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[str | None, Renamed]:
    """Check that the KL compares the same tokens in both output distributions; the teacher's tokenizer lies beside it.

    Args:
        tokenizer: of the student; None: the one beside its weights.
        name: of the teacher, where it is not the one in its configuration.
        trust_remote_code: run code that comes with a tokenizer.

    Returns:
        A line to print, as of `check_teacher_tokens`, and the tokens that text must not hold, as of `renamed_tokens`.

    Raises:
        UserError: as `check_teacher_tokens`.
    """
    name = name or str(teacher.name_or_path)
    named = f"model.teacher {name!r}"
    rows, teacher_rows = (config.get_text_config().vocab_size for config in (student, teacher))
    if tokenizer is None:
        tokenizer = find_tokenizer(student.name_or_path, trust_remote_code)
    else:
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
    other = find_tokenizer(name, trust_remote_code)
    note = check_teacher_tokens(tokenizer, other, rows, teacher_rows, named)
    return note, renamed_tokens(tokenizer, other)


def check_taught(
    tokens: torch.Tensor, student: PreTrainedConfig, teacher: PreTrainedConfig, renamed: Renamed | None = None
) -> None:
    """Raise UserError for a token that the teacher, whose vocabulary is the smaller one, has no embedding for.

    Args:
        renamed: tokens that mean something else to the teacher; the same for one of them.
    """
    check_text_tokens(tokens, renamed or {}, f"model.teacher {str(teacher.name_or_path)!r}")
    rows = teacher.get_text_config().vocab_size
    if rows < student.get_text_config().vocab_size and (largest := int(tokens.max())) >= rows:
        raise UserError(
            f"The training text has the token {largest}, and model.teacher {str(teacher.name_or_path)!r} has {rows} "
            "embeddings. Leave out text with tokens that were added to the student, or choose another teacher."
        )


def block_length(block_size: int | None, *models: Any) -> int:
    """Tokens of a block: as asked for, by default the positions of the student and the teacher, at most 1024.

    Raises:
        UserError: more than one of them has positions.
    """
    limits = [max_positions(model.config) for model in models if getattr(model, "config", None) is not None]
    limit = min((limit for limit in limits if limit is not None), default=None)
    if block_size is not None and limit is not None and block_size > limit:
        raise UserError(
            f"block_size={block_size} is longer than the {limit} positions of the model or its teacher. "
            f"Set it to {limit} or less."
        )
    return block_size or min(_LONGEST_BLOCK, limit or _LONGEST_BLOCK)


def find_tokenizer(name_or_path: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model, None where there is none that can be read."""
    try:
        return load_tokenizer(name_or_path, trust_remote_code=trust_remote_code) if name_or_path else None
    except UserError:
        return None


def as_blocks(
    dataset: Any, tokenizer: PreTrainedTokenizerBase | None, text_field: str, block_size: int, bos: str = "auto"
) -> Any:
    """A data set of raw text or chat data as packed blocks; anything that has `input_ids` as it is."""
    if isinstance(dataset, dict):
        return {name: as_blocks(part, tokenizer, text_field, block_size, bos) for name, part in dataset.items()}
    columns = getattr(dataset, "column_names", None) or []
    chat = chat_columns(columns)
    if "input_ids" in columns or not (chat or text_field in columns):
        return dataset
    what = f"chat data ({', '.join(chat)})" if chat else f"raw text ({text_field!r})"
    if tokenizer is None:
        raise UserError(f"The data set has {what} and there is no tokenizer. Pass processing_class.")
    if not isinstance(dataset, Dataset):
        raise UserError(
            f"A {type(dataset).__name__} of {what} cannot be packed here. Tokenise it to `input_ids` first, "
            "or pass a datasets.Dataset."
        )
    return pack_dataset(dataset, tokenizer, text_field, block_size, bos)
