"""Settings of the loss."""

from dataclasses import dataclass, field
from typing import Literal

from ast_sparse.config.section import Section, about
from ast_sparse.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Section):
    """The loss (4): `ce_weight · CE + kl_weight · D`, D by `kind`, e.g. T² · KL; `alpha` is short for (1-α, α)."""

    _name = "distillation"
    kind: Literal["kl", "reverse_kl", "tinybert", "mobilebert", "squarehead"] = field(
        default="kl",
        metadata=about(
            "L_logit in (4): kl: KL(teacher‖student); reverse_kl: KL(student‖teacher) (15); tinybert: (7)-(10); "
            "mobilebert: (8), (11); squarehead: KL and SquareHead (12)-(14)."
        ),
    )
    alpha: float | None = field(default=None, metadata=about("α of (4), 0 to 1; 0 needs no teacher. Default 0.67."))
    ce_weight: float | None = field(default=None, metadata=about("Weight of the cross-entropy, instead of α."))
    kl_weight: float | None = field(default=None, metadata=about("Weight of the loss of `kind`, instead of α."))
    temperature: float = field(default=1.0, metadata=about("T, the temperature of both output distributions."))
    hidden_weight: float = field(
        default=1.0, metadata=about("tinybert, mobilebert, squarehead: weight of the loss on hidden states.")
    )
    attention_weight: float = field(
        default=1.0, metadata=about("tinybert, mobilebert: weight of the loss on attention maps.")
    )
    match_flops: bool = field(
        default=False,
        metadata=about("Without a teacher, train for as many more steps as the teacher's FLOPs pay for (Table 11)."),
    )

    def _validate(self) -> None:
        if self.alpha is not None:
            for key in ("ce_weight", "kl_weight"):
                if getattr(self, key) is not None:
                    raise UserError(
                        f"distillation.alpha={self.alpha} and distillation.{key}={getattr(self, key)} cannot be "
                        "combined. Give alpha, or both weights."
                    )
            self._require(0 <= self.alpha <= 1, "alpha", "must lie between 0 and 1.")
        elif (self.ce_weight is None) != (self.kl_weight is None):
            missing = "kl_weight" if self.kl_weight is None else "ce_weight"
            raise UserError(f"distillation.{missing} is missing. Give both weights, or alpha alone.")
        for key in ("ce_weight", "kl_weight"):
            self._require(getattr(self, key) is None or getattr(self, key) >= 0, key, "must be 0 or more.")
        self._require(
            self.weights != (0.0, 0.0), "kl_weight", "and distillation.ce_weight are both 0. Raise one of them."
        )
        self._require(self.temperature > 0, "temperature", "must be above 0.")
        for key in ("hidden_weight", "attention_weight"):
            self._require(getattr(self, key) >= 0, key, "must be 0 or more.")
        if self.match_flops:
            problem = "is for a run without a teacher. Set distillation.alpha: 0, or remove it."
            self._require(not self.needs_teacher, "match_flops", problem)

    @property
    def weights(self) -> tuple[float, float]:
        """The weight of CE and the weight of D."""
        if self.ce_weight is not None and self.kl_weight is not None:
            return self.ce_weight, self.kl_weight
        alpha = 0.67 if self.alpha is None else self.alpha
        return 1 - alpha, alpha

    @property
    def needs_teacher(self) -> bool:
        """Whether D has any weight."""
        return self.weights[1] > 0
