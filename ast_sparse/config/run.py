"""The settings of a whole run, read from YAML."""

import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ast_sparse.config.basis import BasisConfig, check_basis
from ast_sparse.config.convert import convert
from ast_sparse.config.data import DataConfig
from ast_sparse.config.distillation import DistillationConfig
from ast_sparse.config.evaluation import EvaluationConfig, WatchConfig
from ast_sparse.config.model import ModelConfig
from ast_sparse.config.optimizer import OptimizerConfig
from ast_sparse.config.removed import removed_hint
from ast_sparse.config.section import Section
from ast_sparse.config.sparsity import CalibrationConfig, SLoRBConfig, SparsityConfig
from ast_sparse.config.yaml12 import parse_yaml, read_yaml
from ast_sparse.errors import UserError, did_you_mean, kind_of, shown, shown_name


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of `ast-train`. `training` is passed to `transformers.TrainingArguments`, `bf16: auto` decided."""

    model: ModelConfig
    data: DataConfig
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    distillation: DistillationConfig | None = field(default_factory=DistillationConfig)
    slorb: SLoRBConfig | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    basis: BasisConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if self.basis is not None:
            check_basis(self.basis, self.sparsity, self.distillation)

    def to_dict(self) -> dict[str, Any]:
        """The whole configuration as plain YAML values, defaults included."""
        sections = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {
            name: value.to_dict() if isinstance(value, Section) else value
            for name, value in sections.items()
            if value is not None or name == "distillation"
        }


SECTIONS: dict[str, type[Section]] = {  # all but `training`, which has no dataclass here
    "model": ModelConfig,
    "data": DataConfig,
    "sparsity": SparsityConfig,
    "distillation": DistillationConfig,
    "slorb": SLoRBConfig,
    "calibration": CalibrationConfig,
    "basis": BasisConfig,
    "optimizer": OptimizerConfig,
    "evaluation": EvaluationConfig,
    "watch": WatchConfig,
}


_DEEPEST = 16  # levels of keys
_LISTED = 20  # maximum number of names in an error


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's settings from YAML.

    Args:
        path: the YAML file.
        overrides: `section.key=value` lines that replace values of the file; values are YAML.

    Raises:
        UserError: one line that names the field, the value and the fix.
    """
    tree = read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    names = [*SECTIONS, "training"]
    for name in tree:
        if name not in names:
            raise UserError(f"{path}: unknown section {shown(name)}. {_nearest(name, names)}")
    sections = {name: _read_section(name, tree[name]) for name in tree}
    for name in ("model", "data"):
        if name not in sections:
            raise UserError(f"{path}: section {name!r} is missing. See configs/quickstart.yaml for an example.")
    return RunConfig(**sections)


def _read_section(name: str, values: Any) -> Any:
    if values is None and name in ("distillation", "slorb", "basis"):
        return None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(
            f"Section {name!r} is {shown(values)}, not a mapping. Write `key: value` lines below `{name}:`."
        )
    if name == "training":
        return _check_training(values)
    section = SECTIONS[name]
    known = [item.name for item in dataclasses.fields(section)]
    for key in values:
        if key not in known:
            raise UserError(f"Unknown key {name}.{shown_name(key)}. {_nearest(key, known)}")
    for item in dataclasses.fields(section):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and values.get(item.name) is None:
            raise UserError(f"{name}.{item.name} is missing. {item.metadata['help']}")
    return section(**values)


def _check_training(values: dict[str, Any]) -> dict[str, Any]:
    """Check names and types against `TrainingArguments`; its own checks run when it is built."""
    from transformers import TrainingArguments  # takes seconds: only when a config is read

    # the annotation of `fsdp` is FSDP1's text and does not allow true; `run/precision.py` decides bf16
    hints = {**typing.get_type_hints(TrainingArguments), "fsdp": bool | None, "bf16": bool | Literal["auto"]}
    known = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    for key in values:
        if key not in known:
            hint = removed_hint(key, values[key])
            raise UserError(hint or f"Unknown key training.{shown_name(key)}. {_nearest(key, known)}")
    return {key: convert(value, hints[key], f"training.{key}") for key, value in values.items()}


def _nearest(name: Any, known: Iterable[str]) -> str:
    names = sorted(known)
    listed = f"Known: {', '.join(names)}." if len(names) <= _LISTED else "See transformers.TrainingArguments."
    return did_you_mean(name, names) or listed


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`; deeper keys (`training.lr_scheduler_kwargs.min_lr_rate`) are allowed."""
    path, sign, text = override.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise UserError(f"--set {override!r} is not of the form section.key=value.")
    if len(keys) > _DEEPEST:
        raise UserError(f"--set {override[:100]!r} … names a key more than {_DEEPEST} levels deep. Correct it.")
    value = parse_yaml(text, f"--set {override!r}: the value")
    node = tree
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        below = node[key]
        if not isinstance(below, dict):
            raise UserError(f"--set {override!r}: {key} is {kind_of(below)}, not a mapping.")
        node = below
    node[keys[-1]] = value
