"""The order of blocks: every block once an epoch, found without a table, the same everywhere."""

import numpy as np
import pytest

from ast_sparse.data.blocks.order import BlockOrder, seed_key
from tests.data.folders import mixed


def by_hand(position: int, blocks: int, key: int) -> int:
    """The twin: one position, in Python integers."""
    epoch, value = divmod(position, blocks)
    epoch_key = mixed(mixed(epoch) ^ key)
    half = max(1, ((blocks - 1).bit_length() + 1) // 2)
    while True:
        left, right = value >> half, value & (2**half - 1)
        for number in range(4):
            left, right = right, left ^ (mixed(epoch_key ^ mixed(right + (number << 32))) & (2**half - 1))
        value = left << half | right
        if value < blocks:
            return value


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_every_block_comes_once_in_every_epoch(blocks: int) -> None:
    order = BlockOrder(blocks, seed_key(0, "a"))
    for epoch in range(3):
        found = order(np.arange(epoch * blocks, (epoch + 1) * blocks))
        assert sorted(found.tolist()) == list(range(blocks))


@pytest.mark.parametrize("blocks", [1, 7, 1000, 1_928_710])
def test_order_equals_its_twin(blocks: int) -> None:
    positions = np.random.default_rng(blocks).integers(0, 3 * blocks, 200)
    key = seed_key(3, "books")
    assert BlockOrder(blocks, key)(positions).tolist() == [by_hand(int(p), blocks, key) for p in positions]


def test_epochs_seeds_and_names_have_orders_of_their_own_without_a_trend() -> None:
    def run(epoch: int, *parts: object) -> np.ndarray:
        return BlockOrder(5000, seed_key(*parts))(np.arange(epoch * 5000, (epoch + 1) * 5000))

    orders = [run(0, 0, "a"), run(1, 0, "a"), run(0, 1, "a"), run(0, 0, "b")]
    for number, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.06  # 4 standard deviations
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06
        for other in orders[:number]:
            assert np.count_nonzero(order == other) < 15  # 1 by chance


def test_order_is_the_same_on_every_machine() -> None:
    assert seed_key(0, "cc") == 12275748529462257455
    assert BlockOrder(1000, seed_key(0, "cc"))(np.arange(6)).tolist() == [31, 761, 678, 611, 628, 49]
