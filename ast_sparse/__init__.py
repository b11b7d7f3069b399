"""Retrain Hugging Face causal language models to N:M sparsity with AST; export, load and measure them."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from ast_sparse.export.registration import register_when_imported

try:
    __version__ = metadata.version("ast-sparse")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

_PUBLIC = {
    "BasisConfig": "config",
    "DataConfig": "config",
    "CalibrationConfig": "config",
    "DistillationConfig": "config",
    "EvaluationConfig": "config",
    "MixtureConfig": "config",
    "ModelConfig": "config",
    "OptimizerConfig": "config",
    "RunConfig": "config",
    "SLoRBConfig": "config",
    "SparsityConfig": "config",
    "WatchConfig": "config",
    "load_config": "config",
    "UserError": "errors",
    "change_basis": "basis.change",
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
    "chunked_distillation_loss": "distillation.chunked",
    "distillation_loss": "distillation.logits",
    "keep_sparsity": "sparsity.kept",
    "KeepSparsityCallback": "training.callbacks.keep_sparsity",
    "SparseTrainer": "training.trainer",
    "replay_batch": "training.callbacks.watch",
    "perplexity": "evaluation.perplexity",
    "AstSparse24Config": "export.quantizer",
    "export_model": "export.export",
    "merge_adapter_sparse": "export.adapter_merge",
    "pack24": "kernels.code24",
    "unpack24": "kernels.code24",
    "load_causal_lm": "storage.load",
    "load_tokenizer": "storage.locate",
}

__all__ = sorted(_PUBLIC)

register_when_imported()  # `AutoModelForCausalLM.from_pretrained` then reads ast_sparse_24 checkpoints

if TYPE_CHECKING:  # the same names for type checkers and editors, which do not run `__getattr__`
    from ast_sparse.basis.change import change_basis as change_basis
    from ast_sparse.config import BasisConfig as BasisConfig
    from ast_sparse.config import CalibrationConfig as CalibrationConfig
    from ast_sparse.config import DataConfig as DataConfig
    from ast_sparse.config import DistillationConfig as DistillationConfig
    from ast_sparse.config import EvaluationConfig as EvaluationConfig
    from ast_sparse.config import MixtureConfig as MixtureConfig
    from ast_sparse.config import ModelConfig as ModelConfig
    from ast_sparse.config import OptimizerConfig as OptimizerConfig
    from ast_sparse.config import RunConfig as RunConfig
    from ast_sparse.config import SLoRBConfig as SLoRBConfig
    from ast_sparse.config import SparsityConfig as SparsityConfig
    from ast_sparse.config import WatchConfig as WatchConfig
    from ast_sparse.config import load_config as load_config
    from ast_sparse.distillation.chunked import chunked_distillation_loss as chunked_distillation_loss
    from ast_sparse.distillation.logits import distillation_loss as distillation_loss
    from ast_sparse.errors import UserError as UserError
    from ast_sparse.evaluation.perplexity import perplexity as perplexity
    from ast_sparse.export.adapter_merge import merge_adapter_sparse as merge_adapter_sparse
    from ast_sparse.export.export import export_model as export_model
    from ast_sparse.export.quantizer import AstSparse24Config as AstSparse24Config
    from ast_sparse.kernels.code24 import pack24 as pack24
    from ast_sparse.kernels.code24 import unpack24 as unpack24
    from ast_sparse.optim import SparseAdamW as SparseAdamW
    from ast_sparse.schedules import mask_decay_at as mask_decay_at
    from ast_sparse.sparsity.kept import keep_sparsity as keep_sparsity
    from ast_sparse.sparsity.layers import SparseConv1D as SparseConv1D
    from ast_sparse.sparsity.layers import SparseLinear as SparseLinear
    from ast_sparse.sparsity.masks import check_nm as check_nm
    from ast_sparse.sparsity.masks import flip_rate as flip_rate
    from ast_sparse.sparsity.masks import nm_mask as nm_mask
    from ast_sparse.sparsity.model import apply_masks as apply_masks
    from ast_sparse.sparsity.model import densify_model as densify_model
    from ast_sparse.sparsity.model import masks_by_parameter as masks_by_parameter
    from ast_sparse.sparsity.model import refresh_masks as refresh_masks
    from ast_sparse.sparsity.model import sparse_layers as sparse_layers
    from ast_sparse.sparsity.model import sparsify_model as sparsify_model
    from ast_sparse.sparsity.oneshot import sparsegpt_prune as sparsegpt_prune
    from ast_sparse.sparsity.oneshot import wanda_mask as wanda_mask
    from ast_sparse.sparsity.slorb import slorb_init as slorb_init
    from ast_sparse.storage.load import load_causal_lm as load_causal_lm
    from ast_sparse.storage.locate import load_tokenizer as load_tokenizer
    from ast_sparse.training.callbacks.keep_sparsity import KeepSparsityCallback as KeepSparsityCallback
    from ast_sparse.training.callbacks.watch import replay_batch as replay_batch
    from ast_sparse.training.trainer import SparseTrainer as SparseTrainer
else:

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used: importing torch and transformers takes seconds."""
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
