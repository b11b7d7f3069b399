"""The settings of a run: one frozen dataclass for each section, read from YAML."""

from ast_sparse.config.basis import BasisConfig
from ast_sparse.config.data import DataConfig, MixtureConfig
from ast_sparse.config.distillation import DistillationConfig
from ast_sparse.config.evaluation import EvaluationConfig, WatchConfig
from ast_sparse.config.model import ModelConfig
from ast_sparse.config.optimizer import OptimizerConfig
from ast_sparse.config.run import SECTIONS, RunConfig, load_config
from ast_sparse.config.sparsity import UNSTRUCTURED, CalibrationConfig, SLoRBConfig, SparsityConfig

__all__ = [
    "SECTIONS", "UNSTRUCTURED", "BasisConfig", "CalibrationConfig", "DataConfig", "DistillationConfig",
    "EvaluationConfig", "MixtureConfig", "ModelConfig", "OptimizerConfig", "RunConfig", "SLoRBConfig",
    "SparsityConfig", "WatchConfig", "load_config",
]  # fmt: skip
