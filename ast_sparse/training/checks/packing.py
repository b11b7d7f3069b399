"""Checks before training that the models keep the documents of a block apart (`data.packing: documents`)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ast_sparse.distributed.full_precision import computes_in_float32
from ast_sparse.distributed.pieces import reshard
from ast_sparse.errors import UserError, one_line
from ast_sparse.evaluation.scoring import eval_mode

_FIX = "Set data.packing: joined."
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 3e-2  # of the largest logit, for float32 and below
_TRIED = ((3, 13), (8, 8))  # lengths of the documents in each row


def check_apart(
    model: PreTrainedModel,
    teacher: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
    args: TrainingArguments,
    collator: Any,
) -> None:
    """Check that student and teacher keep the documents of a block apart.

    A model without flash attention runs two short rows of two documents, and then each document alone. Flash attention
    takes the borders from the positions, but only in a batch of one row.

    Raises:
        UserError: one of them does not, or there is no tokenizer whose EOS token shows where documents end.
    """
    if tokenizer is None or collator is not None:
        raise UserError(
            "packing='documents' needs SparseTrainer's own collator and the tokenizer's EOS token. Pass "
            "processing_class and no data_collator."
        )
    for who, tried in (("the model", model), ("the teacher", teacher)):
        if tried is None:
            continue
        attention = str(getattr(tried.config, "_attn_implementation", ""))
        if "flash" in attention:
            _check_batch(args, attention)
        elif reason := _mixes(tried):
            raise UserError(
                f"data.packing='documents': {who} ({type(tried).__name__}, attention {attention!r}) does not keep "
                f"documents apart by their positions: {reason}. {_FIX}"
            )


def _check_batch(args: TrainingArguments, attention: str) -> None:
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(args, key) != 1:
            raise UserError(
                f"training.{key}={getattr(args, key)}: with attention {attention!r}, data.packing='documents' needs "
                "batches of one block. Set it to 1 and raise gradient_accumulation_steps, or use sdpa."
            )


@torch.no_grad()
def _mixes(model: nn.Module) -> str | None:
    """Why a document's logits depend on the one before it, or None if they do not."""
    device = next(model.parameters()).device
    tokens = torch.arange(1, 1 + sum(_TRIED[0]), device=device).repeat(len(_TRIED), 1)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in _TRIED]).to(device)
    try:
        with eval_mode(model), computes_in_float32(model):
            packed = _logits(model, tokens, position_ids=positions)
            alone = [
                torch.cat([_logits(model, part[None])[0] for part in row.split(list(lengths))])
                for row, lengths in zip(tokens, _TRIED, strict=True)
            ]
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return one_line(error, 200)
    finally:
        reshard(model)  # an optimizer must not take parameters that FSDP2 has left gathered
    expected = torch.stack(alone)
    distance = float((packed - expected).abs().max() / expected.abs().max())
    is_half = next(model.parameters()).element_size() < 4
    if distance <= (_HALF_TOLERANCE if is_half else _TOLERANCE):
        return None
    return f"logits differ by {distance:.1%} from those of each document alone"


def _logits(model: nn.Module, tokens: Tensor, **inputs: Any) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False, **inputs).logits
    return logits.float()
