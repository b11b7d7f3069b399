"""Settings of the masks: pattern, schedule, SLoRB, calibration."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ast_sparse.config.section import Section, about

UNSTRUCTURED = "unstructured"

Method = Literal["magnitude", "wanda", "sparsegpt"]  # the functions are in `sparsity/oneshot.py`
METHOD_HELP: dict[Method, str] = {
    "magnitude": "|W|, needs no text",
    "wanda": "|W| times the norm of the inputs",
    "sparsegpt": "later columns are updated to make up for the pruned weights",
}


@dataclass(frozen=True, kw_only=True)
class SparsityConfig(Section):
    """The pattern, and how masks change during training: annealed SR-STE (paper Sec. 3.2)."""

    _name = "sparsity"
    pattern: str = field(
        default="2:4",
        metadata=about("N:M: N of every M weights kept along the input dimension; or unstructured: half of a layer."),
    )
    criterion: Method = field(
        default="magnitude",
        metadata=about("Score for mask refreshes; wanda and sparsegpt use the activations of the previous step."),
    )
    init: Method = field(
        default="magnitude", metadata=about("One-shot method for the masks at the start; settings in `calibration`.")
    )
    schedule: Literal["constant", "imp", "gmp"] = field(
        default="constant",
        metadata=about(
            "constant: the pattern from the start. imp and gmp: baselines trained with AdamW, whose pruned weights "
            "stay zero; imp prunes in rounds, gmp along a cubic ramp."
        ),
    )
    rounds: int = field(default=4, metadata=about("imp: number of rounds; the last one makes the pattern exact."))
    prune_share: float | None = field(
        default=None, metadata=about("imp: share of the remaining weights pruned in a round; default: equal shares.")
    )
    steps_per_round: int | None = field(
        default=None, metadata=about("imp: training steps in a round; default: total steps / rounds, rounded down.")
    )
    prune_until: float = field(
        default=0.75,
        metadata=about("gmp: share of the steps in which sparsity rises, every `mask_interval` steps."),
    )
    mask_interval: int = field(default=10, metadata=about("Optimizer steps between mask refreshes; 0: fixed masks."))
    mask_decay: float = field(default=6e-5, metadata=about("λ_max of (2)."))
    decay_ramp: float = field(default=0.25, metadata=about("T0/T1: share of the steps in which λ rises."))
    decay_schedule: Literal["annealed", "static", "none"] = field(
        default="annealed", metadata=about("λ over the steps: annealed (2), static: constant, none: zero.")
    )
    decay_placement: Literal["momentum", "gradient", "weight"] = field(
        default="momentum",
        metadata=about("Where in AdamW the decay acts: momentum (20)-(23), gradient (18)-(19), weight (16)-(17)."),
    )
    decay_norm: Literal["l2", "l1"] = field(
        default="l2",
        metadata=about("What decays pruned weights: l2: λ·W (3); l1: λ·sign(W), as in CAST (experimental)."),
    )
    forward: Literal["masked", "dense"] = field(
        default="masked",
        metadata=about(
            "Weights in training steps: masked (1); dense: all of them, as in CAST (experimental). Evaluations and the "
            "final model are masked in either case."
        ),
    )
    kernels: Literal["auto", "eager", "compiled"] = field(
        default="auto",
        metadata=about(
            "Whether masks and updates use torch.compile; auto: compiled for 10 million masked weights or more, if a "
            "compiler works. A resumed run uses what its checkpoint used."
        ),
    )
    fast_forward: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata=about(
            "Whether training steps compute norms, activations and gates again in the backward pass, which takes less "
            "memory; auto: on a CPU, where it is faster, and on a GPU only if the run does not fit without it."
        ),
    )
    masked_weights: Literal["auto", "kept", "made"] = field(
        default="auto",
        metadata=about(
            "Masked weights of a run in 16 bits on one device or with DDP. kept: a 16-bit copy of each, 2 bytes a "
            "weight; made: made again whenever they are needed, which is slower; auto: kept if the memory of a GPU is "
            "enough, and on a CPU. Results are the same."
        ),
    )
    semi_structured: Literal["off", "auto", "on"] = field(
        default="off",
        metadata=about(
            "Whether forward products of a 2:4 run in 16 bits, on one GPU or with DDP, are PyTorch's semi-structured "
            "ones (cuSPARSELt); they take 1.1 bytes a weight. auto: the first 20 steps find out whether steps are "
            "faster with them. Results agree within rounding. Not measured on a GPU."
        ),
    )
    include: tuple[str, ...] = field(default=(), metadata=about("Prune only matching layers; * is a wildcard."))
    exclude: tuple[str, ...] = field(default=(), metadata=about("Keep matching layers dense; * is a wildcard."))

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
            problem = f"is for sparsity.schedule=imp, and would be ignored with {self.schedule}. Remove it."
            self._require(getattr(self, key) is None, key, problem)
        for key in ("criterion", "init") if self.is_gradual else ():
            problem = f"needs sparsity.schedule=constant: {self.schedule} prunes by magnitude. Remove one of them."
            self._require(getattr(self, key) == "magnitude", key, problem)
        if self.forward == "dense":
            problem = "needs masks that may change. Set schedule: constant, and mask_interval above 0."
            self._require(not self.fixed_masks, "forward", problem)
        if self.schedule == "gmp":
            self._require(self.mask_interval > 0, "mask_interval", "leaves gmp no step to prune at. Set 1 or more.")

    @property
    def n(self) -> int:
        """Weights kept in each group; 1 (of 2) without groups."""
        return int(self.pattern.split(":")[0]) if self.structured else 1

    @property
    def m(self) -> int:
        """Weights in a group; 2 without groups."""
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
    def is_gradual(self) -> bool:
        """Whether sparsity rises to the pattern during the run (IMP, GMP): pruned weights are and stay zero."""
        return self.schedule != "constant"

    @property
    def fixed_masks(self) -> bool:
        """Whether pruned weights never come back, and so need no gradient."""
        return self.mask_interval == 0 or self.is_gradual


@dataclass(frozen=True, kw_only=True)
class SLoRBConfig(Section):
    """SLoRB (paper Sec. 3.4)."""

    _name = "slorb"
    enabled: bool = field(default=True, metadata=about("Whether sparse layers get the adapter."))
    k: int = field(default=16, metadata=about("Columns in a group; must divide in_features."))
    init: Literal["mean", "zero", "svd"] = field(
        default="mean",
        metadata=about(
            "mean: S from pruned weights (6); zero: 0; svd: S and X make up for as much of each layer's error on the "
            "calibration text as their rank allows. Choose svd if sparsity.init reads text."
        ),
    )
    train_projection: bool = field(default=True, metadata=about("Whether X of (5) is trained."))
    start: float = field(
        default=0.0,
        metadata=about(
            "Share of the steps before SLoRB is trained, then alone (Table 12); 0: from the start, with the weights."
        ),
    )

    def _validate(self) -> None:
        self._require(self.k >= 1, "k", "must be at least 1.")
        self._require(0 <= self.start < 1, "start", "must be 0 or more and below 1.")
        self._require(
            self.start == 0 or self.init != "svd", "init", "is made while the model is pruned. Set slorb.start to 0."
        )


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(Section):
    """Calibration text for one-shot pruning, and settings of SparseGPT."""

    _name = "calibration"
    data: tuple[str | dict[str, Any], ...] | None = field(
        default=None, metadata=about("Sources, as in `data.train`; default: the training text.")
    )
    samples: int = field(default=128, metadata=about("Sequences to calibrate on."))
    seq_len: int | None = field(default=None, metadata=about("Tokens in a sequence; default: `data.block_size`."))
    damping: float = field(
        default=0.01, metadata=about("SparseGPT: share of the Hessian's mean diagonal that is added to the diagonal.")
    )
    block_size: int = field(default=128, metadata=about("SparseGPT: columns pruned before the rest is updated."))
    keep_zeros: bool = field(
        default=False,
        metadata=about(
            "SparseGPT: weights of the model that are already 0 stay 0; with the other methods they always do. This "
            "applies to pruning only: training may change them like any other weight."
        ),
    )
    seed: int = field(default=0, metadata=about("Random seed for choosing the sequences."))
    recovery_epochs: int = field(
        default=0,
        metadata=about(
            "Passes over the sequences that train each pruned block towards the dense block's outputs; 0: none."
        ),
    )
    recovery_learning_rate: float = field(default=2e-4, metadata=about("Learning rate of that training."))
    recovery_batch_size: int = field(default=4, metadata=about("Sequences in a batch of that training."))

    def _validate(self) -> None:
        self._require(self.data is None or len(self.data) > 0, "data", "names no source. List files, or remove it.")
        for key in ("samples", "block_size", "recovery_batch_size"):
            self._require(getattr(self, key) >= 1, key, "must be at least 1.")
        self._require(self.seq_len is None or self.seq_len >= 2, "seq_len", "must be at least 2 tokens.")
        for key in ("damping", "recovery_epochs"):
            self._require(getattr(self, key) >= 0, key, "must be 0 or more.")
        self._require(0 < self.recovery_learning_rate < 1, "recovery_learning_rate", "must be above 0 and below 1.")
        self._require(0 <= self.seed < 2**32, "seed", "must lie between 0 and 4294967295.")
