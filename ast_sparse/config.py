"""The settings of a run: one frozen dataclass a section, read from YAML."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ast_sparse.conversion import convert
from ast_sparse.errors import UserError
from ast_sparse.yaml12 import kind_of, parse_yaml, read_yaml, shown, shown_name


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class _Section:
    """Checks the type of every field; subclasses check values in `_validate`."""

    _name = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = convert(getattr(self, item.name), hints[item.name], f"{self._name}.{item.name}")
            object.__setattr__(self, item.name, value)
        self._validate()

    def _validate(self) -> None: ...

    def _require(self, condition: bool, key: str, mend: str) -> None:
        if not condition:
            raise UserError(f"{self._name}.{key}={shown(getattr(self, key))} {mend}")

    def to_dict(self) -> dict[str, Any]:
        """The section as plain YAML values."""
        return {
            item.name: list(value) if isinstance(value := getattr(self, item.name), tuple) else value
            for item in dataclasses.fields(self)
        }


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """The model to retrain, and its teacher."""

    _name = "model"
    name_or_path: str = field(metadata=_help("Hub id, local folder, or .gguf file of the dense model."))
    revision: str | None = field(default=None, metadata=_help("Branch, tag or commit on the hub."))
    gguf_file: str | None = field(default=None, metadata=_help("Name of a .gguf file inside `name_or_path`."))
    attn_implementation: str | None = field(default=None, metadata=_help("Attention of transformers: sdpa, eager, …"))
    trust_remote_code: bool = field(default=False, metadata=_help("Run code that the model's repository brings."))
    teacher: str | None = field(default=None, metadata=_help("Another teacher; default: the dense model itself."))
    config_overrides: dict[str, Any] = field(
        default_factory=dict, metadata=_help("Values that replace those of config.json, e.g. {resid_pdrop: 0.0}.")
    )
    random_weights: bool = field(
        default=False, metadata=_help("Train from random weights of `training.seed`; the teacher keeps its own.")
    )

    def _validate(self) -> None:
        for key in ("name_or_path", "revision", "gguf_file", "attn_implementation", "teacher"):
            self._require(getattr(self, key) != "", key, "is empty. Give it a value, or remove it.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Text to train on and to hold out."""

    _name = "data"
    root: str | None = field(default=None, metadata=_help("Folder that relative paths start from."))
    train: tuple[str | dict[str, Any], ...] = field(
        metadata=_help("Files (text, JSONL, parquet; globs) or `datasets.load_dataset` arguments, one source an entry.")
    )
    eval: tuple[str | dict[str, Any], ...] | None = field(
        default=None, metadata=_help("Held-out sources; default: a share of `train`.")
    )
    eval_share: float = field(default=0.02, metadata=_help("Share of the documents held out of training, 0 to 0.5."))
    text_field: str = field(default="text", metadata=_help("Name of the text column or key."))
    block_size: int = field(default=1024, metadata=_help("Tokens of a training sequence."))
    seed: int = field(default=0, metadata=_help("Chooses the held-out documents."))

    def _validate(self) -> None:
        self._require(len(self.train) > 0, "train", "names no source. List at least one file.")
        self._require(self.eval is None or len(self.eval) > 0, "eval", "names no source. List files, or remove it.")
        for key in ("train", "eval"):
            entries = getattr(self, key) or ()
            self._require("" not in entries and {} not in entries, key, "has an empty entry. Fill or remove it.")
        self._require(0 <= self.eval_share <= 0.5, "eval_share", "must lie between 0 and 0.5.")
        self._require(self.block_size >= 2, "block_size", "must be at least 2 tokens.")


UNSTRUCTURED = "unstructured"


@dataclass(frozen=True, kw_only=True)
class SparsityConfig(_Section):
    """The pattern, and how masks move: annealed SR-STE (paper Sec. 3.2)."""

    _name = "sparsity"
    pattern: str = field(
        default="2:4",
        metadata=_help("N:M, N kept of every M weights along the input dimension; or unstructured: half of a layer."),
    )
    criterion: Literal["magnitude", "wanda", "sparsegpt"] = field(
        default="magnitude",
        metadata=_help("Score of a mask refresh; wanda and sparsegpt look at the activations of the step before it."),
    )
    init: Literal["magnitude", "wanda", "sparsegpt"] = field(
        default="magnitude", metadata=_help("One-shot method training starts from; settings in `calibration`.")
    )
    schedule: Literal["constant", "imp", "gmp"] = field(
        default="constant",
        metadata=_help(
            "constant: the pattern from the start. Baselines whose pruned weights stay zero, trained by AdamW: imp "
            "prunes in rounds, gmp along a cubic ramp."
        ),
    )
    rounds: int = field(default=4, metadata=_help("imp: how often it prunes; the last round makes the pattern exact."))
    prune_share: float | None = field(
        default=None, metadata=_help("imp: share of the remaining weights a round prunes; default: equal shares.")
    )
    steps_per_round: int | None = field(
        default=None, metadata=_help("imp: steps of training after each pruning; default: total steps / rounds.")
    )
    prune_until: float = field(
        default=0.75, metadata=_help("gmp: share of the steps over which sparsity rises, every `mask_interval` steps.")
    )
    mask_interval: int = field(default=10, metadata=_help("Optimizer steps between mask refreshes; 0: masks fixed."))
    mask_decay: float = field(default=6e-5, metadata=_help("λ_max of (2)."))
    decay_ramp: float = field(default=0.25, metadata=_help("T0/T1: share of the steps over which λ rises."))
    decay_schedule: Literal["annealed", "static", "none"] = field(
        default="annealed", metadata=_help("λ over the steps: (2), constant, or zero.")
    )
    decay_placement: Literal["momentum", "gradient", "weight"] = field(
        default="momentum", metadata=_help("Where the decay enters AdamW: (20)-(23), (18)-(19) or (16)-(17).")
    )
    include: tuple[str, ...] = field(default=(), metadata=_help("Prune only layers that match; * is a wildcard."))
    exclude: tuple[str, ...] = field(default=(), metadata=_help("Layers that stay dense; * is a wildcard."))

    def _validate(self) -> None:
        match = self.pattern == UNSTRUCTURED or re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}", self.pattern)
        self._require(bool(match), "pattern", "is not of the form N:M. Write for example 2:4, or unstructured.")
        self._require(0 < self.n < self.m, "pattern", "needs 0 < N < M. Write for example 2:4.")
        self._require(self.mask_interval >= 0, "mask_interval", "must be 0 (fixed masks) or more.")
        self._require(self.mask_decay >= 0, "mask_decay", "must be 0 or more.")
        self._require(0 <= self.decay_ramp <= 1, "decay_ramp", "must lie between 0 and 1.")
        self._require(self.rounds >= 1, "rounds", "must be at least 1.")
        self._require(self.prune_share is None or 0 < self.prune_share < 1, "prune_share", "must lie between 0 and 1.")
        self._require(
            self.steps_per_round is None or self.steps_per_round >= 1, "steps_per_round", "must be at least 1."
        )
        self._require(0 < self.prune_until <= 1, "prune_until", "must be above 0 and at most 1.")
        for key in ("prune_share", "steps_per_round") if self.schedule != "imp" else ():
            mend = f"is for sparsity.schedule=imp, and would be ignored with {self.schedule}. Remove it."
            self._require(getattr(self, key) is None, key, mend)
        for key in ("criterion", "init") if self.schedule != "constant" else ():
            mend = f"goes with sparsity.schedule=constant: {self.schedule} prunes by magnitude. Remove one of them."
            self._require(getattr(self, key) == "magnitude", key, mend)
        if self.schedule == "gmp":
            self._require(self.mask_interval > 0, "mask_interval", "leaves gmp no step to prune at. Set 1 or more.")

    @property
    def n(self) -> int:
        """Weights kept of each group; 1 (of 2) where there are no groups."""
        return int(self.pattern.split(":")[0]) if self.structured else 1

    @property
    def m(self) -> int:
        """Weights of a group; 2 where there are no groups."""
        return int(self.pattern.split(":")[1]) if self.structured else 2

    @property
    def structured(self) -> bool:
        """Whether the pattern has groups."""
        return self.pattern != UNSTRUCTURED

    @property
    def final_sparsity(self) -> float:
        """Share of the weights that the pattern prunes."""
        return 1 - self.n / self.m

    @property
    def fixed_masks(self) -> bool:
        """Whether pruned weights never come back, so that they get no gradient."""
        return self.mask_interval == 0 or self.schedule != "constant"


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(_Section):
    """The loss (4): `ce_weight · CE + kl_weight · D`, D by `kind`, e.g. T² · KL; `alpha` is shorthand for (1-α, α)."""

    _name = "distillation"
    kind: Literal["kl", "reverse_kl", "tinybert", "mobilebert", "squarehead"] = field(
        default="kl",
        metadata=_help(
            "What stands for L_logit in (4): KL(teacher‖student), KL(student‖teacher) (15), TinyBERT (7)-(10), "
            "MobileBERT (8), (11), or KL and SquareHead (12)-(14)."
        ),
    )
    alpha: float | None = field(default=None, metadata=_help("α of (4), 0 to 1; 0 needs no teacher. Default 0.67."))
    ce_weight: float | None = field(default=None, metadata=_help("Weight of the cross-entropy, instead of α."))
    kl_weight: float | None = field(default=None, metadata=_help("Weight of the loss of `kind`, instead of α."))
    temperature: float = field(default=1.0, metadata=_help("T of the softened output distributions."))
    hidden_weight: float = field(
        default=1.0, metadata=_help("Weight of hidden states beside the logits: tinybert, mobilebert, squarehead.")
    )
    attention_weight: float = field(
        default=1.0, metadata=_help("Weight of attention maps beside the logits: tinybert, mobilebert.")
    )
    match_flops: bool = field(
        default=False,
        metadata=_help("A run without teacher gets the steps that the FLOPs of the teacher pay for (Table 11)."),
    )

    def _validate(self) -> None:
        if self.alpha is not None:
            for key in ("ce_weight", "kl_weight"):
                if getattr(self, key) is not None:
                    raise UserError(
                        f"distillation.alpha={self.alpha} and distillation.{key}={getattr(self, key)} exclude each "
                        "other. Give alpha, or both weights."
                    )
            self._require(0 <= self.alpha <= 1, "alpha", "must lie between 0 and 1.")
        elif (self.ce_weight is None) != (self.kl_weight is None):
            missing = "kl_weight" if self.kl_weight is None else "ce_weight"
            raise UserError(f"distillation.{missing} is missing. Give both weights, or alpha alone.")
        for key in ("ce_weight", "kl_weight"):
            self._require(getattr(self, key) is None or getattr(self, key) >= 0, key, "must be 0 or more.")
        self._require(
            self.weights != (0.0, 0.0), "kl_weight", "and distillation.ce_weight are both 0: nothing to train on."
        )
        self._require(self.temperature > 0, "temperature", "must be above 0.")
        for key in ("hidden_weight", "attention_weight"):
            self._require(getattr(self, key) >= 0, key, "must be 0 or more.")
        if self.match_flops:
            mend = "is for a run without teacher. Set distillation.alpha: 0, or remove it."
            self._require(not self.needs_teacher, "match_flops", mend)

    @property
    def weights(self) -> tuple[float, float]:
        """(weight of CE, weight of T²·KL)."""
        if self.ce_weight is not None and self.kl_weight is not None:
            return self.ce_weight, self.kl_weight
        alpha = 0.67 if self.alpha is None else self.alpha
        return 1 - alpha, alpha

    @property
    def needs_teacher(self) -> bool:
        """Whether the KL has any weight."""
        return self.weights[1] > 0


@dataclass(frozen=True, kw_only=True)
class SLoRBConfig(_Section):
    """SLoRB (paper Sec. 3.4)."""

    _name = "slorb"
    enabled: bool = field(default=True, metadata=_help("Whether sparse layers get the adapter."))
    k: int = field(default=16, metadata=_help("Columns a group; divides in_features."))
    init: Literal["mean", "zero"] = field(default="mean", metadata=_help("S from the pruned weights (6), or zero."))
    train_projection: bool = field(default=True, metadata=_help("Whether X of (5) is trained."))
    start: float = field(
        default=0.0,
        metadata=_help("Share of the steps before SLoRB; after it SLoRB alone is trained (Table 12). 0: together."),
    )

    def _validate(self) -> None:
        self._require(self.k >= 1, "k", "must be at least 1.")
        self._require(0 <= self.start < 1, "start", "must be 0 or more and below 1.")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(_Section):
    """Text that one-shot pruning measures activations on, and settings of SparseGPT."""

    _name = "calibration"
    data: tuple[str | dict[str, Any], ...] | None = field(
        default=None, metadata=_help("Sources, as in `data.train`; default: the training text.")
    )
    samples: int = field(default=128, metadata=_help("Sequences to calibrate on."))
    seq_len: int | None = field(default=None, metadata=_help("Tokens of a sequence; default: `data.block_size`."))
    damping: float = field(
        default=0.01, metadata=_help("SparseGPT: share of the Hessian's mean diagonal that is added to it.")
    )
    block_size: int = field(default=128, metadata=_help("SparseGPT: columns pruned before the rest is updated."))
    seed: int = field(default=0, metadata=_help("Chooses the sequences."))

    def _validate(self) -> None:
        self._require(self.data is None or len(self.data) > 0, "data", "names no source. List files, or remove it.")
        for key in ("samples", "block_size"):
            self._require(getattr(self, key) >= 1, key, "must be at least 1.")
        self._require(self.seq_len is None or self.seq_len >= 2, "seq_len", "must be at least 2 tokens.")
        self._require(self.damping >= 0, "damping", "must be 0 or more.")
        self._require(0 <= self.seed < 2**32, "seed", "must lie between 0 and 4294967295.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(_Section):
    """Perplexities that `ast-train` reports for the dense, the one-shot and the retrained model."""

    _name = "evaluation"
    datasets: tuple[str, ...] = field(
        default=("heldout",), metadata=_help("`heldout`, `wikitext2`, or text files; empty: none.")
    )
    seq_len: int | None = field(default=None, metadata=_help("Window; default: the published one of the family."))
    windows: int | None = field(default=None, metadata=_help("At most so many windows of each; default: all."))
    data_dir: str | None = field(default=None, metadata=_help("Folder with wiki.test.raw, instead of the hub."))
    steps: int | None = field(
        default=None, metadata=_help("Measure and log them during training too, every so many steps.")
    )

    def _validate(self) -> None:
        self._require(self.seq_len is None or self.seq_len >= 2, "seq_len", "must be at least 2 tokens.")
        for key in ("windows", "steps"):
            self._require(getattr(self, key) is None or getattr(self, key) >= 1, key, "must be at least 1.")
        self._require("" not in self.datasets, "datasets", "has an empty entry. Fill or remove it.")
        mend = "has nothing to measure: evaluation.datasets is empty. Name a data set, or remove it."
        self._require(self.steps is None or len(self.datasets) > 0, "steps", mend)


@dataclass(frozen=True, kw_only=True)
class WatchConfig(_Section):
    """What a run does when its loss is not finite, or jumps."""

    _name = "watch"
    nan: Literal["stop", "skip"] = field(
        default="stop", metadata=_help("A loss or gradient that is not finite: end the run, or pass over the update.")
    )
    spike: Literal["off", "warn", "skip", "stop"] = field(
        default="off", metadata=_help("A loss above `spike_factor` times the median of the last `spike_window` steps.")
    )
    spike_factor: float = field(default=3.0, metadata=_help("How far above the median a loss may be, above 1."))
    spike_window: int = field(default=50, metadata=_help("Steps of the median; so many come before the first verdict."))
    max_skips: int = field(default=10, metadata=_help("Steps that may be skipped in a row before the run ends."))

    def _validate(self) -> None:
        self._require(self.spike_factor > 1, "spike_factor", "must be above 1.")
        for key in ("spike_window", "max_skips"):
            self._require(getattr(self, key) >= 1, key, "must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything `ast-train` reads. `training` goes to `transformers.TrainingArguments` as it is."""

    model: ModelConfig
    data: DataConfig
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    distillation: DistillationConfig | None = field(default_factory=DistillationConfig)
    slorb: SLoRBConfig | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def to_dict(self) -> dict[str, Any]:
        """The whole configuration as plain YAML values, defaults included."""
        sections = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {
            name: value.to_dict() if isinstance(value, _Section) else value
            for name, value in sections.items()
            if value is not None or name == "distillation"
        }


SECTIONS: dict[str, type[_Section]] = {  # all but `training`, which is no dataclass of ours
    "model": ModelConfig,
    "data": DataConfig,
    "sparsity": SparsityConfig,
    "distillation": DistillationConfig,
    "slorb": SLoRBConfig,
    "calibration": CalibrationConfig,
    "evaluation": EvaluationConfig,
    "watch": WatchConfig,
}


_DEEPEST = 16  # levels of keys
_LISTED = 20  # names that an error lists


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run's settings from YAML.

    Args:
        path: the YAML file.
        overrides: `section.key=value` lines that replace what the file says; values are YAML.

    Raises:
        UserError: one line that names the field, the value and the mend.
    """
    tree = read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    names = [*SECTIONS, "training"]
    for name in tree:
        if name not in names:
            raise UserError(f"{path}: unknown section {shown(name)}.{_nearest(name, names)}")
    sections = {name: _read_section(name, tree[name]) for name in tree}
    for name in ("model", "data"):
        if name not in sections:
            raise UserError(f"{path}: section {name!r} is missing. See configs/quickstart.yaml for an example.")
    return RunConfig(**sections)


def _read_section(name: str, values: Any) -> Any:
    if values is None and name in ("distillation", "slorb"):
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
            raise UserError(f"Unknown key {name}.{shown_name(key)}.{_nearest(key, known)}")
    for item in dataclasses.fields(section):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and values.get(item.name) is None:
            raise UserError(f"{name}.{item.name} is missing. {item.metadata['help']}")
    return section(**values)


def _check_training(values: dict[str, Any]) -> dict[str, Any]:
    """Names and types against `TrainingArguments`; its own checks run when it is built."""
    from transformers import TrainingArguments  # takes seconds: only when a config is read

    hints = typing.get_type_hints(TrainingArguments)
    known = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    for key in values:
        if key not in known:
            raise UserError(f"Unknown key training.{shown_name(key)}.{_nearest(key, known)}")
    return {key: convert(value, hints[key], f"training.{key}") for key, value in values.items()}


def _nearest(name: Any, known: Iterable[str]) -> str:
    names = sorted(known)
    if matches := difflib.get_close_matches(str(name), names, n=1):
        return f" Did you mean {matches[0]!r}?"
    return f" Known: {', '.join(names)}." if len(names) <= _LISTED else " See transformers.TrainingArguments."


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `section.key=value`, with deeper keys (`training.lr_scheduler_kwargs.min_lr_rate`) allowed."""
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
