"""The mixture: samples follow from the seed and the history of the shares, by rules computed by hand."""

import json
import math
from typing import Any

import numpy as np
import pytest

from ast_sparse.config import MixtureConfig
from ast_sparse.data.blocks.domains import DomainBlocks, Mixture, updated_shares
from ast_sparse.data.blocks.order import BlockOrder, seed_key
from ast_sparse.errors import UserError
from tests.data.folders import mixed

BLOCKS = {"cc": 50, "wiki": 7, "book": 300}
SHARES = (0.5, 0.2, 0.3)


def mixture(batch: int = 8, seed: int = 0) -> Mixture:
    return Mixture(BLOCKS, SHARES, seed, batch)


def samples(mixture: Mixture, *steps: int) -> list[tuple[int, int]]:
    return [pair for step in steps for pair in zip(*(part.tolist() for part in mixture.samples(step)), strict=True)]


def by_hand(count: int, shares_of: Any, seed: int = 0) -> list[tuple[int, int]]:
    """The twin: one sample after another. `shares_of(i)` are the shares in force at sample i."""
    key = seed_key(seed, "domain of a sample")
    used, found = [0, 0, 0], []
    for i in range(count):
        uniform = (mixed(mixed(i) ^ key) >> 11) / 2**53
        first, second, _ = shares_of(i)
        domain = 0 if uniform < first else 1 if uniform < first + second else 2
        name = list(BLOCKS)[domain]
        order = BlockOrder(BLOCKS[name], seed_key(seed, "blocks", name))
        found.append((domain, int(order(np.array([used[domain]]))[0])))
        used[domain] += 1
    return found


def test_samples_equal_their_twin_through_changes_of_the_shares() -> None:
    ours = mixture()
    found = samples(ours, 0, 1, 2)
    ours.change_shares(3, (0.1, 0.1, 0.8), (2.0, 1.0, 3.0))
    found += samples(ours, 3, 4)
    ours.change_shares(5, (0.0, 1.0, 0.0), (1.0, 1.0, 1.0))
    found += samples(ours, 5)
    at = [SHARES] * 24 + [(0.1, 0.1, 0.8)] * 16 + [(0.0, 1.0, 0.0)] * 8
    assert found == by_hand(48, lambda i: at[i])
    assert all(domain == 1 for domain, _ in found[40:])


def test_blocks_are_not_repeated_before_their_domain_is_used_up() -> None:
    ours = mixture()
    for step in range(0, 40, 2):
        ours.change_shares(step, SHARES if step % 4 else (0.2, 0.1, 0.7), (1.0, 1.0, 1.0))
    found = samples(ours, *range(40))
    for domain, count in enumerate(BLOCKS.values()):
        blocks = [block for which, block in found if which == domain]
        for first in range(0, len(blocks), count):
            epoch = blocks[first : first + count]
            assert len(set(epoch)) == len(epoch)
    assert ours.used(40).tolist() == [sum(which == domain for which, _ in found) for domain in range(3)]
    assert ours.used(40)[1] > 2 * BLOCKS["wiki"]  # a small domain comes again, in another order


def test_any_step_is_found_without_those_before_it() -> None:
    ours = mixture()
    ours.change_shares(2, (0.1, 0.1, 0.8), (1.0, 1.0, 1.0))
    expected = [samples(ours, step) for step in range(6)]
    for step in (5, 0, 3):
        again = mixture()
        again.load_history(json.loads(json.dumps(ours.state())))
        assert samples(again, step) == expected[step]


def test_a_change_holds_from_its_step_on_even_if_samples_were_asked_for_ahead() -> None:
    ahead, lazy = mixture(), mixture()
    samples(ahead, *range(6))
    for one in (ahead, lazy):
        one.change_shares(3, (0.0, 0.0, 1.0), (1.0, 1.0, 1.0))
    assert samples(ahead, 3, 4) == samples(lazy, 3, 4)
    assert [ahead.shares_at(step) for step in (2, 3)] == [SHARES, (0.0, 0.0, 1.0)]


def test_shares_are_met_and_a_share_of_zero_is_never_drawn() -> None:
    ours = Mixture(BLOCKS, (0.25, 0.0, 0.75), 1, 50_000)
    counts = np.bincount(ours.samples(0)[0], minlength=3) / 50_000
    assert counts[1] == 0 and abs(counts[0] - 0.25) < 0.008  # 4 standard deviations
    assert np.bincount(Mixture(BLOCKS, (0.4, 0.6, 0.0), 1, 50_000).samples(0)[0], minlength=3)[2] == 0


def test_doremi_is_the_rule_computed_by_hand() -> None:
    config = MixtureConfig(type="doremi", rate=1.0, floor=1e-4)
    # w·e^(loss − target): .5·e^.2, .3·e^-.1, .2·e^0 = .6107013791, .2714512254, .2; their sum 1.0821526045
    found = updated_shares((0.5, 0.3, 0.2), (2.2, 1.4, 1.0), (2.0, 1.5, 1.0), config)
    expected = [0.9999 * part / 1.0821526045 + 1e-4 / 3 for part in (0.6107013791, 0.2714512254, 0.2)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found == pytest.approx([0.56431, 0.25085, 0.18483], abs=1e-5) and math.fsum(found) == pytest.approx(1)


def test_bandit_clip_and_rate_are_the_rule_computed_by_hand() -> None:
    shares, losses, targets = (0.5, 0.3, 0.2), (2.2, 1.4, 1.0), (2.0, 1.5, 1.0)
    # w + η·(loss − target), η = 2: .9, .1, .2
    weights = [math.exp(value) for value in (0.9, 0.1, 0.2)]
    found = updated_shares(shares, losses, targets, MixtureConfig(type="bandit", rate=2.0, floor=0.3))
    assert found == pytest.approx([0.7 * weight / sum(weights) + 0.1 for weight in weights], rel=1e-12)
    clipped = updated_shares(shares, losses, targets, MixtureConfig(type="doremi", floor=0.0, clip=True))
    total = 0.5 * math.exp(0.2) + 0.3 + 0.2
    assert clipped == pytest.approx([0.5 * math.exp(0.2) / total, 0.3 / total, 0.2 / total], rel=1e-12)
    assert updated_shares(shares, losses, targets, MixtureConfig(type="constant")) == shares


def test_a_share_of_zero_and_huge_losses_stay_finite() -> None:
    config = MixtureConfig(type="doremi", floor=0.01)
    found = updated_shares((0.0, 1.0), (2000.0, 1000.0), (1.0, 1.0), config)
    assert found == pytest.approx([0.005, 0.995])


def test_rows_of_domains_say_where_they_are_from() -> None:
    parts = {name: [{"input_ids": [number, place]} for place in range(3 + number)] for number, name in enumerate("ab")}
    joined = DomainBlocks(parts)
    assert len(joined) == 7 and joined.offsets.tolist() == [0, 3, 7]
    assert [row["domain_index"] for row in joined] == [0, 0, 0, 1, 1, 1, 1]
    assert joined[4] == {"input_ids": [1, 1], "domain_index": 1} and joined[2:4] == [joined[2], joined[3]]
    with pytest.raises(IndexError):
        joined[7]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"history": []}, ValueError),
        ({"history": [{"step": 1, "shares": SHARES, "losses": None}]}, ValueError),
        ({"history": [{"step": 0, "shares": (0.5, 0.5), "losses": None}]}, ValueError),
        ({"history": [{"step": 0, "shares": (0.5, 0.9, -0.4), "losses": None}]}, ValueError),
        ({"history": [{"step": 0, "shares": SHARES, "losses": None}] * 2}, ValueError),
        ({"history": [{"step": "0", "shares": SHARES, "losses": None}]}, ValueError),
        ({"history": [3]}, TypeError),
    ],
)
def test_damaged_history_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    ours = mixture()
    with pytest.raises(error):
        ours.load_history({**ours.state(), **change})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "doremy"}, r"data\.update\.type='doremy' is text, expected .*Did you mean 'doremi'"),
        ({"rate": -1.0}, r"data\.update\.rate=-1\.0 must be 0 or more"),
        ({"floor": 2.0}, r"data\.update\.floor=2\.0 must lie between 0 and 1"),
    ],
)
def test_wrong_update_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MixtureConfig(**values)
