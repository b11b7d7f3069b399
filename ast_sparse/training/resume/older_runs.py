"""Checkpoints of older versions: what was counted otherwise; and, where they saved no settings, their other files,
compared with the resumed run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import TrainerState

from ast_sparse.data.blocks.domains import DomainBlocks
from ast_sparse.data.blocks.stored import TokenBlocks
from ast_sparse.data.tokens.bos import own_bos
from ast_sparse.errors import UserError
from ast_sparse.storage.sparsity_record import SparsityRecord


def stored_training(checkpoint: Path) -> dict[str, Any]:
    """The fields of TrainingArguments in the state of the optimizer; empty if it is sharded."""
    path = checkpoint / OPTIMIZER_NAME
    if not path.is_file():
        return {}
    groups = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
    first = groups[0]
    return {
        "learning_rate": first["initial_lr"],
        "adam_beta1": first["betas"][0],
        "adam_beta2": first["betas"][1],
        "adam_epsilon": first["eps"],
        "weight_decay": max(group["weight_decay"] for group in groups),
    }


def check_bos(checkpoint: Path, data: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, blocks: Any) -> None:
    """Raise UserError if text gets BOS now: versions that saved no settings never added it.

    Args:
        data: settings of the text.
        blocks: the training data; shards have the BOS they were made with, and chat templates write their own.
    """
    parts = blocks.parts.values() if isinstance(blocks, DomainBlocks) else [blocks]
    is_text = any(
        not isinstance(part, TokenBlocks) and "labels" not in (getattr(part, "column_names", None) or ())
        for part in parts
    )
    if data["bos"] != "none" and is_text and own_bos(tokenizer):
        raise UserError(
            f"data.bos={data['bos']!r} puts BOS before the text, and {str(checkpoint)!r} was trained without it. "
            "Resume with data.bos=none, or start a new run with another output folder."
        )


def count_flops(state: TrainerState, checkpoint: Path, parameters: int) -> None:
    """Let a state count FLOPs as now: older versions left out a head that is tied, but recorded the same tokens.

    Args:
        state: changed in place.
        checkpoint: the folder that it was read from.
        parameters: that multiply each token.
    """
    tokens = SparsityRecord.read(checkpoint).get("trained", "tokens")
    if isinstance(tokens, int) and round(state.total_flos / (6 * parameters)) != tokens:
        state.total_flos = float(6 * parameters * tokens)
