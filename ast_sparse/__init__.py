"""Retrain Hugging Face causal language models to N:M sparsity with AST; export, load and measure them."""

from importlib import import_module, metadata
from typing import Any

from ast_sparse.export.registration import register_when_imported

try:
    __version__ = metadata.version("ast-sparse")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

_PUBLIC = {
    "DataConfig": "config",
    "CalibrationConfig": "config",
    "DistillationConfig": "config",
    "EvaluationConfig": "config",
    "MixtureConfig": "config",
    "ModelConfig": "config",
    "RunConfig": "config",
    "SLoRBConfig": "config",
    "SparsityConfig": "config",
    "WatchConfig": "config",
    "load_config": "config",
    "UserError": "errors",
    "check_nm": "sparsity.masks",
    "flip_rate": "sparsity.masks",
    "nm_mask": "sparsity.masks",
    "SparseConv1D": "sparsity.layers",
    "SparseLinear": "sparsity.layers",
    "slorb_init": "sparsity.slorb",
    "sparsegpt_prune": "sparsity.oneshot",
    "wanda_mask": "sparsity.oneshot",
    "apply_masks": "sparsity.model",
    "densify_model": "sparsity.model",
    "masks_by_parameter": "sparsity.model",
    "refresh_masks": "sparsity.model",
    "sparse_layers": "sparsity.model",
    "sparsify_model": "sparsity.model",
    "SparseAdamW": "optim",
    "mask_decay_at": "schedules",
    "distillation_loss": "distillation.logits",
    "SparseTrainer": "training.trainer",
    "replay_batch": "training.callbacks.watch",
    "perplexity": "evaluation.perplexity",
    "AstSparse24Config": "export.quantizer",
    "export_model": "export.export",
    "pack24": "export.codec24",
    "unpack24": "export.codec24",
    "load_causal_lm": "storage.load",
    "load_tokenizer": "storage.locate",
}

__all__ = sorted(_PUBLIC)

register_when_imported()  # `AutoModelForCausalLM.from_pretrained` then reads ast_sparse_24 checkpoints


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
