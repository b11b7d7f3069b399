"""Settings of the change of basis before pruning."""

from dataclasses import dataclass, field

from ast_sparse.config.distillation import DistillationConfig
from ast_sparse.config.section import Section, about
from ast_sparse.config.sparsity import SparsityConfig
from ast_sparse.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BasisConfig(Section):
    """How the dense model is rewritten before it is pruned: it computes the same, and loses less to the pattern."""

    _name = "basis"
    permute: bool = field(
        default=True,
        metadata=about("Reorder channels so that each group of M has N strong inputs; needs calibration text."),
    )
    rotation_steps: int = field(
        default=0,
        metadata=about("Steps in which a rotation of the residual stream and of the values is learned; 0: none."),
    )
    rotation_learning_rate: float = field(
        default=2e-3, metadata=about("Learning rate of the rotation, in radians per step and plane at most.")
    )
    rotation_share: float = field(
        default=0.15, metadata=about("Share of the rows or columns of a weight that a step of the rotation looks at.")
    )
    untie: bool = field(
        default=True,
        metadata=about(
            "A rotation needs an output head of its own: untie it from the embedding, which adds parameters. False: "
            "such a model is refused."
        ),
    )

    def _validate(self) -> None:
        self._require(self.rotation_steps >= 0, "rotation_steps", "must be 0 (no rotation) or more.")
        self._require(self.rotation_learning_rate > 0, "rotation_learning_rate", "must be above 0.")
        self._require(0 < self.rotation_share <= 1, "rotation_share", "must be above 0 and at most 1.")

    @property
    def is_on(self) -> bool:
        """Whether anything is changed; calibration text is needed then."""
        return self.permute or self.rotation_steps > 0

    @property
    def unties(self) -> bool:
        """Whether the output head gets a weight of its own, if it shares the embedding's."""
        return self.rotation_steps > 0 and self.untie


def check_basis(basis: BasisConfig, sparsity: SparsityConfig, distillation: DistillationConfig | None = None) -> None:
    """Raise UserError for settings that a change of basis cannot be combined with."""
    if not basis.is_on:
        return
    if not sparsity.structured:
        raise UserError(
            f"sparsity.pattern={sparsity.pattern!r} has no groups to arrange channels in. Set N:M, or leave out the "
            "change of basis.",
            "sparsity.pattern",
        )
    if distillation is None or not distillation.needs_teacher or distillation.hidden_weight == 0:
        return
    if distillation.kind in ("tinybert", "mobilebert", "squarehead"):
        raise UserError(
            f"distillation.kind={distillation.kind!r} compares hidden states with the teacher's, which are in another "
            "basis. Set distillation.hidden_weight: 0 or another kind, or remove the section `basis`."
        )
