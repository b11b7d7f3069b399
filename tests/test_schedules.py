import pytest

from ast_sparse.schedules import mask_decay_at


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
