"""Settings of the model."""

from dataclasses import dataclass, field
from typing import Any

from ast_sparse.config.section import Section, about


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The model to retrain, and its teacher."""

    _name = "model"
    name_or_path: str = field(metadata=about("Hub id, local folder, or .gguf file of the dense model."))
    revision: str | None = field(default=None, metadata=about("Branch, tag or commit on the hub."))
    gguf_file: str | None = field(default=None, metadata=about("Name of a .gguf file inside `name_or_path`."))
    attn_implementation: str | None = field(default=None, metadata=about("Attention of transformers: sdpa, eager, …"))
    trust_remote_code: bool = field(default=False, metadata=about("Run code that comes with model and teacher."))
    teacher: str | None = field(
        default=None,
        metadata=about("Another teacher with the student's tokenizer; default: the dense model itself."),
    )
    config_overrides: dict[str, Any] = field(
        default_factory=dict, metadata=about("Values that replace those in config.json, e.g. {resid_pdrop: 0.0}.")
    )
    random_weights: bool = field(
        default=False,
        metadata=about("Start from random weights, drawn with `training.seed`; the teacher keeps its weights."),
    )

    def _validate(self) -> None:
        for key in ("name_or_path", "revision", "gguf_file", "attn_implementation", "teacher"):
            self._require(getattr(self, key) != "", key, "is empty. Give it a value, or remove it.")
