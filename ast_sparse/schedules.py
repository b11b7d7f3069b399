"""What changes with the step: the mask decay."""

from typing import Literal

DecaySchedule = Literal["annealed", "static", "none"]


def mask_decay_at(
    step: int,
    total_steps: int,
    mask_decay: float,
    decay_ramp: float = 0.25,
    decay_schedule: DecaySchedule = "annealed",
) -> float:
    """λ for the update from `global_step` = `step` to `step` + 1, (2).

    Args:
        step: updates done so far, so that the first update of an annealed run has λ = 0.
        total_steps: T1.
        mask_decay: λ_max.
        decay_ramp: T0/T1; 0 gives λ_max from the start.
        decay_schedule: `annealed` as (2), `static` SR-STE (λ_max throughout), or `none` (0).

    Raises:
        ValueError: an unknown `decay_schedule`.
    """
    if decay_schedule == "none":
        return 0.0
    if decay_schedule not in ("annealed", "static"):
        raise ValueError(f"sparsity.decay_schedule={decay_schedule!r} is unknown. Use 'annealed', 'static' or 'none'.")
    ramp_steps = decay_ramp * total_steps
    if decay_schedule == "static" or step >= ramp_steps:
        return mask_decay
    return mask_decay * step / ramp_steps
