"""What changes with the step: the mask decay, the sparsity of the baselines IMP and GMP, and the start of SLoRB."""

from typing import Literal

from ast_sparse.config import SLoRBConfig, SparsityConfig

DecaySchedule = Literal["annealed", "static", "none"]

_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


def mask_decay_at(
    step: int,
    total_steps: int,
    mask_decay: float,
    decay_ramp: float = 0.25,
    decay_schedule: DecaySchedule = "annealed",
) -> float:
    """λ of (2) for the update from `global_step` = `step` to `step` + 1.

    Args:
        step: updates done so far; the first update of an annealed run has λ = 0.
        total_steps: T1.
        mask_decay: λ_max.
        decay_ramp: T0/T1; 0 means λ_max from the start.
        decay_schedule: `annealed` (2), `static` (SR-STE, λ_max throughout), or `none` (0).

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


def gradual_sparsity_at(step: int, total_steps: int, final_sparsity: float, prune_until: float = 0.75) -> float:
    """GMP's share of pruned weights after `step` updates: `s · (1 − (1 − t)³)` (Zhu & Gupta 2017).

    Args:
        step: updates done so far.
        total_steps: steps of the run.
        final_sparsity: s.
        prune_until: share of the steps after which t is 1.
    """
    done = step / (prune_until * total_steps)
    if done > 1 - _ROUNDING:
        return final_sparsity
    return final_sparsity * (1 - (1 - done) ** 3)


def iterative_sparsity_at(
    step: int,
    total_steps: int,
    final_sparsity: float,
    rounds: int = 4,
    prune_share: float | None = None,
    steps_per_round: int | None = None,
) -> float:
    """IMP's share of pruned weights after `step` updates; each round prunes, then trains.

    Args:
        step: updates done so far; the first round prunes before the first update.
        total_steps: steps of the run.
        final_sparsity: the share after the last round.
        rounds: number of times that weights are pruned.
        prune_share: share of the remaining weights that a round prunes; default: the same share in every round.
        steps_per_round: updates in a round; default `total_steps / rounds`, rounded down: the last round gets the rest.
    """
    length = max(1, total_steps // rounds) if steps_per_round is None else steps_per_round
    done = min(rounds, step // length + 1)
    if done == rounds:
        return final_sparsity
    kept = (1 - final_sparsity) ** (1 / rounds) if prune_share is None else 1 - prune_share
    return min(final_sparsity, 1 - kept**done)


def sparsity_at(config: SparsityConfig, step: int, total_steps: int) -> float:
    """The share of pruned weights after `step` updates according to `sparsity.schedule`."""
    final = config.final_sparsity
    if config.schedule == "gmp":
        return gradual_sparsity_at(step, total_steps, final, config.prune_until)
    if config.schedule == "imp":
        return iterative_sparsity_at(
            step, total_steps, final, config.rounds, config.prune_share, config.steps_per_round
        )
    return final


def is_refresh_due(config: SparsityConfig, step: int, total_steps: int) -> bool:
    """Whether masks are recomputed after update number `step`."""
    if config.schedule == "imp":
        return sparsity_at(config, step, total_steps) > sparsity_at(config, step - 1, total_steps)
    at_interval = config.mask_interval > 0 and step % config.mask_interval == 0
    return at_interval or (config.schedule == "gmp" and step == total_steps)


def lacks_rounds(config: SparsityConfig, total_steps: int) -> bool:
    """Whether the run is too short for IMP to begin its last round."""
    return config.schedule == "imp" and sparsity_at(config, total_steps - 1, total_steps) < config.final_sparsity


def decay_at(config: SparsityConfig, step: int, total_steps: int) -> float:
    """λ of a run for the update from `step` to `step` + 1; 0 if pruned weights are zero already."""
    if config.is_gradual:
        return 0.0
    return mask_decay_at(step, total_steps, config.mask_decay, config.decay_ramp, config.decay_schedule)


def slorb_step(slorb: SLoRBConfig | None, total_steps: int) -> int | None:
    """The number of updates after which only SLoRB is trained (Table 12); None if it is trained from the start."""
    if slorb is None or not slorb.enabled or slorb.start == 0:
        return None
    return int(slorb.start * total_steps + _ROUNDING)
