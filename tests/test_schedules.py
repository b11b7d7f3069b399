import pytest

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.schedules import (
    decay_at,
    gradual_sparsity_at,
    is_refresh_due,
    iterative_sparsity_at,
    lacks_rounds,
    mask_decay_at,
    slorb_step,
)


def test_annealed_decay_ramps_to_its_maximum_at_a_quarter_and_stays() -> None:
    values = [mask_decay_at(step, 40, 8e-5) for step in range(41)]
    assert values[0] == 0.0
    assert values[:11] == pytest.approx([8e-5 * step / 10 for step in range(11)])
    assert values[10:] == [8e-5] * 31


def test_ramp_that_is_no_whole_number_of_steps_is_followed_exactly() -> None:
    assert mask_decay_at(1, 10, 1.0, decay_ramp=0.25) == pytest.approx(0.4)
    assert mask_decay_at(3, 10, 1.0, decay_ramp=0.25) == 1.0


def test_static_decay_is_constant_and_none_is_zero() -> None:
    assert {mask_decay_at(step, 40, 8e-5, decay_schedule="static") for step in range(41)} == {8e-5}
    assert {mask_decay_at(step, 40, 8e-5, decay_schedule="none") for step in range(41)} == {0.0}


def test_ramp_of_zero_starts_at_the_maximum() -> None:
    assert mask_decay_at(0, 40, 8e-5, decay_ramp=0.0) == 8e-5


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="decay_schedule='cosine' is unknown"):
        mask_decay_at(0, 40, 1.0, decay_schedule="cosine")  # type: ignore[arg-type]


def test_gradual_sparsity_follows_the_cubic_ramp() -> None:
    values = {step: gradual_sparsity_at(step, 40, 0.5, prune_until=0.5) for step in (0, 5, 10, 19, 20, 40)}
    expected = {0: 0.0, 5: 0.2890625, 10: 0.4375, 19: 0.5 * (1 - 0.05**3), 20: 0.5, 40: 0.5}
    assert values == pytest.approx(expected, rel=1e-12)
    assert gradual_sparsity_at(39, 40, 0.75, prune_until=1.0) < gradual_sparsity_at(40, 40, 0.75, prune_until=1.0)
    assert gradual_sparsity_at(3, 30, 0.5, prune_until=0.1) == 0.5  # 0.1 * 30 is 3.0000000000000004


def test_iterative_sparsity_prunes_equal_shares_of_what_is_left() -> None:
    values = [iterative_sparsity_at(step, 10, 0.5, rounds=4) for step in range(10)]
    rounds = [0.15910358, 0.29289322, 0.40539644, 0.5]  # 1 - 0.5 ** (i / 4)
    assert values == pytest.approx([rounds[0]] * 2 + [rounds[1]] * 2 + [rounds[2]] * 2 + [rounds[3]] * 4, rel=1e-7)
    assert values[6:] == [0.5] * 4


def test_iterative_sparsity_takes_a_share_and_the_length_of_a_round() -> None:
    values = [iterative_sparsity_at(step, 10, 0.5, 3, prune_share=0.2, steps_per_round=2) for step in range(6)]
    assert values == pytest.approx([0.2, 0.2, 0.36, 0.36, 0.5, 0.5])
    early = [iterative_sparsity_at(step, 8, 0.5, 4, prune_share=0.4) for step in range(8)]
    assert early == pytest.approx([0.4, 0.4] + [0.5] * 6)  # never more than the pattern prunes
    assert {iterative_sparsity_at(step, 8, 0.75, rounds=1) for step in range(8)} == {0.75}


def test_masks_of_imp_are_due_where_a_round_begins_and_those_of_gmp_at_the_end_too() -> None:
    imp = SparsityConfig(schedule="imp", rounds=3)
    assert [step for step in range(1, 12) if is_refresh_due(imp, step, 11)] == [3, 6]
    gmp = SparsityConfig(schedule="gmp", mask_interval=4)
    assert [step for step in range(1, 12) if is_refresh_due(gmp, step, 11)] == [4, 8, 11]
    assert [step for step in range(1, 12) if is_refresh_due(SparsityConfig(mask_interval=4), step, 11)] == [4, 8]
    assert not any(is_refresh_due(SparsityConfig(mask_interval=0), step, 11) for step in range(1, 12))


def test_slorb_alone_begins_at_a_whole_step() -> None:
    assert slorb_step(SLoRBConfig(start=0.29), 100) == 29  # 0.29 * 100 is 28.999999999999996
    assert slorb_step(SLoRBConfig(start=0.5), 7) == 3
    assert slorb_step(SLoRBConfig(start=0.1), 5) == 0
    assert slorb_step(SLoRBConfig(), 7) is slorb_step(SLoRBConfig(enabled=False, start=0.5), 7) is None


@pytest.mark.parametrize("schedule", ["imp", "gmp"])
def test_a_schedule_whose_pruned_weights_are_zero_has_no_decay(schedule: str) -> None:
    gradual = SparsityConfig(schedule=schedule, mask_decay=1e-2, decay_schedule="static")  # type: ignore[arg-type]
    constant = SparsityConfig(mask_decay=1e-2, decay_schedule="static")
    assert gradual.is_gradual and decay_at(gradual, 50, 100) == 0.0
    assert not constant.is_gradual and decay_at(constant, 50, 100) == 1e-2


def test_decay_follows_the_ramp_and_the_schedule_of_the_settings() -> None:
    ramp = SparsityConfig(mask_decay=1.0, decay_ramp=0.5)
    assert [decay_at(ramp, step, 40) for step in (0, 10, 20, 39)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert decay_at(SparsityConfig(mask_decay=1.0, decay_schedule="none"), 10, 40) == 0.0


@pytest.mark.parametrize(("schedule", "steps", "expected"), [("imp", 3, True), ("imp", 4, False), ("gmp", 3, False)])
def test_only_imp_can_lack_steps_for_its_last_round(schedule: str, steps: int, expected: bool) -> None:
    config = SparsityConfig(schedule=schedule, rounds=4)  # type: ignore[arg-type]
    assert lacks_rounds(config, steps) is expected
