"""What is exported: the model of an object or a folder, with its masks, its SLoRB pairs and its record."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ast_sparse.config import SparsityConfig
from ast_sparse.distributed.pieces import refuse_sharded
from ast_sparse.errors import UserError
from ast_sparse.export.adapter_merge import MergeReport, load_adapter_to_merge, merge_adapter_sparse
from ast_sparse.export.card_subject import with_run
from ast_sparse.export.quantizer import CompressedLinear
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.storage import files
from ast_sparse.storage.dtypes import reading_dtype
from ast_sparse.storage.load import load_checkpoint
from ast_sparse.storage.model_kind import check_reloads, is_causal
from ast_sparse.storage.origin import Origin, read_generation_config
from ast_sparse.storage.save import split_state_dict
from ast_sparse.storage.sparsity_record import SparsityRecord

_DEFAULT_PATTERN = "2:4"


@dataclass(frozen=True)
class Source:
    """What is exported. Weights are masked; `folder` is None if a model object was given.

    If the adapter of a folder was merged, `adapter` is that folder, and `merge` says what it cost.
    """

    model: PreTrainedModel
    weights: dict[str, Tensor]
    masks: dict[str, Tensor]
    slorb: files.SlorbPairs
    folder: Path | None
    origin: Origin
    record: SparsityRecord
    pattern: Pattern
    adapter: str | None
    merge: MergeReport | None


def open_source(
    model_or_dir: Any,
    folder: Path | None,
    pattern: str | None,
    record: dict[str, Any],
    trust_remote_code: bool,
    adapter: str | Path | None,
    adapter_samples: Tensor | None,
    in_float32: bool,
) -> Source:
    merge = None
    if folder is None:
        model, recorded = model_or_dir, SparsityRecord.from_dict(record)
        _check_model(model)
        weights, masks, slorb = split_state_dict(model.state_dict())
        layer = next(iter(sparse_layers(model).values()), None)
        found = None if layer is None else str(layer.pattern)
    else:
        files.require_model_folder(folder)
        read_generation_config(folder)  # before the weights
        dtype = torch.float32 if in_float32 or adapter is not None else reading_dtype(folder)
        checkpoint = load_checkpoint(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        model, masks, slorb = checkpoint.model, checkpoint.masks, checkpoint.slorb
        check_reloads(model, str(folder))
        recorded = with_run(SparsityRecord.read(folder), folder)
        found = recorded.pattern
        if adapter is not None:
            adapted = load_adapter_to_merge(model, adapter)
            model, merge = merge_adapter_sparse(
                adapted, pattern, None if adapter_samples is None else [adapter_samples]
            )
        weights = split_state_dict(model.state_dict())[0]
    checked = SparsityConfig(pattern=pattern or found or _DEFAULT_PATTERN)
    return Source(
        model=model, weights=weights, masks=masks, slorb=slorb, folder=folder, origin=Origin.of(model, folder),
        record=recorded, pattern=Pattern.of(checked), adapter=None if adapter is None else str(adapter), merge=merge,
    )  # fmt: skip


def _check_model(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"Cannot export a {type(model).__name__}. Give a causal LM of transformers, or a folder.")
    if not is_causal(model.config) and not model.is_remote_code():
        raise UserError(
            f"Cannot export a {type(model).__name__}: AutoModelForCausalLM would not load it, and an export is read "
            "back. Save it with trainer.save_model(FOLDER)."
        )
    refuse_sharded(model, "Save it whole with trainer.save_model(FOLDER), and export that folder.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError("Cannot export a model with a PEFT adapter attached. Give the folder it was loaded from.")
    if any(isinstance(module, CompressedLinear) for module in model.modules()):
        raise UserError("Cannot export compressed layers. Load the model with `dequantize: true`, or give its folder.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError("Cannot export a quantized model. Give its folder, or load it with `load_causal_lm`.")
