"""Settings of the loss."""

from dataclasses import dataclass, field
from typing import Literal

from ast_sparse.config.section import Section, about
from ast_sparse.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(Section):
    """The loss (4): `ce_weight · CE + kl_weight · D`, D by `kind`, e.g. T² · KL; `alpha` is shorthand for (1-α, α)."""

    _name = "distillation"
    kind: Literal["kl", "reverse_kl", "tinybert", "mobilebert", "squarehead"] = field(
        default="kl",
        metadata=about(
            "What stands for L_logit in (4): KL(teacher‖student), KL(student‖teacher) (15), TinyBERT (7)-(10), "
            "MobileBERT (8), (11), or KL and SquareHead (12)-(14)."
        ),
    )
    alpha: float | None = field(default=None, metadata=about("α of (4), 0 to 1; 0 needs no teacher. Default 0.67."))
    ce_weight: float | None = field(default=None, metadata=about("Weight of the cross-entropy, instead of α."))
    kl_weight: float | None = field(default=None, metadata=about("Weight of the loss of `kind`, instead of α."))
    temperature: float = field(default=1.0, metadata=about("T of the softened output distributions."))
    hidden_weight: float = field(
        default=1.0, metadata=about("Weight of hidden states beside the logits: tinybert, mobilebert, squarehead.")
    )
    attention_weight: float = field(
        default=1.0, metadata=about("Weight of attention maps beside the logits: tinybert, mobilebert.")
    )
    match_flops: bool = field(
        default=False,
        metadata=about("A run without teacher gets the steps that the FLOPs of the teacher pay for (Table 11)."),
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
