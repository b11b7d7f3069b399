"""Position codes against enumeration, hand-computed values and the paper; what they cost on the masks of models."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ast_sparse.errors import UserError
from ast_sparse.export.position_codes import (
    HuffmanCode,
    closed_bound,
    decode_fixed,
    encode_fixed,
    fixed_bits,
    huffman_lengths,
    uniform_huffman_bits,
)
from ast_sparse.export.position_cost import (
    CompressionTable,
    Layer,
    PatternCost,
    measure_positions,
    pattern_rank,
    pattern_unrank,
    weight_bits,
)
from ast_sparse.sparsity.masks import Pattern, nm_mask


def every_pattern(n: int, m: int) -> Tensor:
    """All patterns in the order of their ranks: by the last kept column, then the one before it."""
    kept = sorted(itertools.combinations(range(m), n), key=lambda columns: columns[::-1])
    return torch.tensor([[column in columns for column in range(m)] for columns in kept])


def random_groups(n: int, count: int, seed: int = 0) -> Tensor:
    return nm_mask(torch.rand(count, 2 * n, generator=torch.Generator().manual_seed(seed)), n, 2 * n)


def layer(n: int, rows: int = 64, columns: int = 64, seed: int = 0) -> Layer:
    """A layer pruned to n:2n with a random mask, which only its zeros show."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Layer(torch.where(random_groups(n, rows * columns // (2 * n), seed + 1).view(rows, columns), weight, 0))


def dense(rows: int = 64, columns: int = 64, seed: int = 0) -> Layer:
    return Layer(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))


def by_pattern(table: CompressionTable) -> dict[str, PatternCost]:
    return {row.pattern: row for row in table.rows}


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (1, 4), (3, 8), (3, 6)])
def test_ranks_enumerate_all_patterns(n: int, m: int) -> None:
    groups = every_pattern(n, m)
    ranks = torch.arange(math.comb(m, n))
    assert torch.equal(pattern_rank(groups, n), ranks)
    assert torch.equal(pattern_unrank(ranks, n, m), groups)


@pytest.mark.parametrize("n", [8, 16, 32])
def test_random_and_extreme_patterns_survive_rank_and_unrank(n: int) -> None:
    groups = random_groups(n, 5000)
    ranks = pattern_rank(groups, n)
    by_hand = sum(math.comb(c, i) for i, c in enumerate(groups[0].nonzero().flatten().tolist(), start=1))
    assert int(ranks[0]) == by_hand
    assert torch.equal(pattern_unrank(ranks, n, 2 * n), groups)
    first, last = torch.arange(2 * n) < n, torch.arange(2 * n) >= n
    assert pattern_rank(torch.stack((first, last)), n).tolist() == [0, math.comb(2 * n, n) - 1]


def test_rank_keeps_the_shape_in_front_of_the_groups() -> None:
    groups = random_groups(2, 12).view(3, 4, 4)
    assert pattern_rank(groups, 2).shape == (3, 4)
    assert torch.equal(pattern_unrank(pattern_rank(groups, 2), 2, 4), groups)


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 groups of 4 do not keep exactly 2"):
        pattern_rank(torch.tensor([[True, True, False, False], [True, True, True, False]]), 2)
    with pytest.raises(ValueError, match="not bool"):
        pattern_rank(torch.ones(1, 4), 2)
    with pytest.raises(ValueError, match="0 < N < M"):
        pattern_rank(torch.ones(1, 4, dtype=torch.bool), 4)
    with pytest.raises(ValueError, match="33:66"):
        pattern_unrank(torch.tensor([0]), 33, 66)
    for wrong in (torch.tensor([6]), torch.tensor([-1]), torch.tensor([0], dtype=torch.int32)):
        with pytest.raises(ValueError, match="from 0 to 5"):
            pattern_unrank(wrong, 2, 4)


# bits of a group: bitmask, index, combinatorial ⌈log2 C(2n,n)⌉ with C = 2, 6, 70, 12870, 601080390
BITS = {1: (2, 1, 1), 2: (4, 4, 3), 4: (8, 12, 7), 8: (16, 32, 14), 16: (32, 80, 30)}


@pytest.mark.parametrize("n", BITS)
def test_bits_of_the_codes_of_fixed_length(n: int) -> None:
    assert tuple(fixed_bits(n).values()) == BITS[n]


# C_n = 1/16 + ⌈log2 C(2n,n)⌉/(64n), worked out by hand (paper Sec. 6.1)
C_N = {1: 0.078125, 2: 0.0859375, 4: 0.08984375, 8: 0.08984375, 16: 0.091796875}


@pytest.mark.parametrize("n", C_N)
def test_paper_ratio(n: int) -> None:
    bits = fixed_bits(n)["combinatorial"]
    assert weight_bits(bits, n) / 32 == C_N[n] == 1 / 16 + bits / (64 * n)


def test_ratio_tends_to_three_in_thirty_two() -> None:
    table = measure_positions({"a": dense()})
    assert table.limit == 3 / 32
    assert weight_bits(closed_bound(2**40), 2**40) / 32 == pytest.approx(3 / 32, abs=1e-10)
    assert weight_bits(3, 2, value_bits=16) == 8.75


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 32])
def test_closed_bound_lies_just_above_the_bound(n: int) -> None:
    bound = math.log2(math.comb(2 * n, n))
    assert bound < closed_bound(n) < bound + 1 / (5 * n)


def test_closed_bound_of_two_by_hand() -> None:
    assert closed_bound(2) == pytest.approx(4 - math.log2(math.sqrt(2 * math.pi)))


@pytest.mark.parametrize("width", [1, 3, 14, 30, 61])
def test_fixed_code_gives_the_numbers_back_without_gaps(width: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**width, 1001)
    stream = encode_fixed(values, width)
    assert stream.dtype == np.uint8 and stream.size == -(-1001 * width // 8)
    assert np.array_equal(decode_fixed(stream, width, 1001), values)


def test_fixed_code_starts_with_the_highest_bit() -> None:
    assert encode_fixed(np.array([5, 1]), 4).tolist() == [0b0101_0001]


def shortest_mean(counts: list[int]) -> int:
    """The fewest total bits of any prefix code: tries every set of lengths that Kraft's inequality allows."""
    longest = max(len(counts) - 1, 1)
    return min(
        sum(map(math.prod, zip(counts, lengths, strict=True)))
        for lengths in itertools.product(range(1, longest + 1), repeat=len(counts))
        if sum(2.0**-length for length in lengths) <= 1
    )


@pytest.mark.parametrize(
    "counts", [[1, 1], [7, 1], [1, 1, 1], [5, 2, 1], [1, 1, 2, 3, 5], [9, 9, 9, 9, 1], [4, 4, 4, 4, 4, 4]]
)
def test_huffman_is_the_best_of_all_prefix_codes(counts: list[int]) -> None:
    lengths = huffman_lengths(np.array(counts))
    assert int((lengths * counts).sum()) == shortest_mean(counts)
    assert sum(2.0 ** -int(length) for length in lengths) == 1


@pytest.mark.parametrize("symbols", [2, 6, 70, 12870])
@pytest.mark.parametrize("skew", [0, 1, 8])
def test_huffman_lies_less_than_a_bit_above_the_entropy(symbols: int, skew: int) -> None:
    counts = (1e6 * np.random.default_rng(0).random(symbols) ** skew + 1).astype(np.int64)
    shares = counts / counts.sum()
    entropy = -(shares * np.log2(shares)).sum()
    mean = (shares * huffman_lengths(counts)).sum()
    assert entropy - 1e-9 <= mean < entropy + 1


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_uniform_closed_form_is_huffman_of_equal_frequencies(n: int) -> None:
    assert huffman_lengths(np.full(math.comb(2 * n, n), 3)).mean() == pytest.approx(uniform_huffman_bits(n))


def test_uniform_closed_form_by_hand() -> None:
    assert uniform_huffman_bits(2) == pytest.approx((2 * 2 + 4 * 3) / 6)  # 6 patterns: two words of 2 bits, four of 3
    assert math.log2(math.comb(32, 16)) < uniform_huffman_bits(16) < 30


def test_symbols_that_do_not_occur_have_no_word() -> None:
    assert huffman_lengths(np.array([0, 4, 0, 2, 1])).tolist() == [0, 1, 0, 2, 2]
    assert huffman_lengths(np.array([0, 9, 0])).tolist() == [0, 0, 0]


COUNTS = {
    "one": [0, 5],
    "two": [3, 1],
    "uniform": [1] * 70,
    "gaps": [0, 9, 0, 0, 1, 4, 0],
    "fibonacci": [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987, 1597, 2584, 4181, 6765],
}


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_huffman_stream_gives_the_symbols_back(case: str, count: int) -> None:
    counts = np.array(COUNTS[case])
    occurring = np.flatnonzero(counts)
    symbols = np.random.default_rng(0).choice(occurring, count)
    symbols[: occurring.size] = occurring[:count]
    code = HuffmanCode(counts)
    stream, starts = code.encode(symbols)
    assert starts[-1] == code.lengths[symbols].sum() and stream.size == -(-starts[-1] // 8)
    assert np.array_equal(code.decode(stream, starts, count), symbols)


def test_dense_model_is_measured_on_what_magnitude_keeps() -> None:
    layers = {"a": dense(128, seed=0), "b": dense(256, seed=1)}
    table = measure_positions(layers)
    assert table.own is None and table.weights == 384 * 64 and table.layers == 2
    assert list(by_pattern(table)) == ["1:2", "2:4", "4:8", "8:16", "16:32"]
    for row in table.rows:
        assert not row.own and row.tied == 0 and row.groups == row.checked == table.weights // (2 * row.n)
        assert tuple(row.bits[code] for code in ("bitmask", "index", "combinatorial")) == BITS[row.n]
    row = by_pattern(table)["2:4"]
    masks = torch.cat([nm_mask(layer.weight.abs(), 2, 4).view(-1, 4) for layer in layers.values()])
    counts = pattern_rank(masks, 2).bincount()
    shares = counts / counts.sum()
    assert row.used == 6 and row.entropy == pytest.approx(float(-(shares * shares.log2()).sum()), abs=1e-5)
    assert row.bits["huffman"] == pytest.approx(float((shares * huffman_lengths(counts.numpy())).sum()), abs=1e-5)
    assert row.entropy <= row.bits["huffman"] < row.entropy + 1


def test_own_mask_is_measured_in_every_pattern_it_fits() -> None:
    table = measure_positions({"a": layer(2, 512, seed=0), "b": layer(2, 512, seed=5)})
    rows = by_pattern(table)
    assert table.own == "2:4"
    assert {pattern: row.own for pattern, row in rows.items()} == {
        "1:2": False, "2:4": True, "4:8": True, "8:16": True, "16:32": True,
    }  # fmt: skip
    assert rows["2:4"].tied is None and rows["1:2"].tied > 0  # a pair of zeros is tied
    assert rows["4:8"].used == 36  # two groups of six patterns each
    assert rows["4:8"].entropy == pytest.approx(2 * rows["2:4"].entropy, abs=0.02)


def test_groups_too_few_to_show_frequencies_get_the_closed_form() -> None:
    row = by_pattern(measure_positions({"a": dense()}))["4:8"]  # 512 groups, 70 patterns
    assert row.used is None and row.entropy is None and row.bits["huffman"] == uniform_huffman_bits(4)


def test_stored_mask_counts_rather_than_the_zeros() -> None:
    found = layer(2)
    mask = nm_mask(torch.arange(64.0).expand(64, 64), 2, 4)  # the last two of each four
    rows = by_pattern(measure_positions({"a": Layer(found.weight, mask)}, Pattern(2, 4)))
    assert rows["2:4"].used == 1 and rows["2:4"].entropy == rows["2:4"].bits["huffman"] == 0


def test_group_with_fewer_non_zeros_keeps_its_last_zeros() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0, 3.0] * 8 + [0.0, 0.0, 1.0, 2.0] * 8]).expand(64, 64)
    assert by_pattern(measure_positions({"a": Layer(weight)}, Pattern(2, 4)))["2:4"].used == 1


def test_code_that_does_not_give_the_masks_back_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(rank: Tensor, n: int, m: int) -> Tensor:
        return pattern_unrank(rank.flip(0), n, m)

    monkeypatch.setattr("ast_sparse.export.position_cost.pattern_unrank", damaged)
    with pytest.raises(RuntimeError, match="combinatorial code of groups of 2"):
        measure_positions({"a": dense()})


def test_own_pattern_beside_those_of_the_paper_gets_a_row() -> None:
    found = layer(3, 64, 192)
    table = measure_positions({"a": found}, Pattern(3, 6))
    assert [row.pattern for row in table.rows] == ["1:2", "2:4", "3:6", "4:8", "8:16", "16:32"]
    assert [row.pattern for row in table.rows if row.own] == ["3:6"]


def test_layers_left_dense_and_unfit_widths_are_not_counted_and_named() -> None:
    table = measure_positions({"a": layer(2), "b": dense(), "c": layer(2, 64, 48)})
    assert table.layers == 2 and table.weights == 64 * (64 + 48)
    assert by_pattern(table)["16:32"].layers == 1 and by_pattern(table)["8:16"].layers == 2
    assert table.left_out == (
        "1 layers, e.g. b: not 2:4",
        "1 layers of 16:32, e.g. c: in_features=48 is not a multiple of 32",
    )


def test_text_shows_every_row_in_every_table() -> None:
    lines = "\n".join(measure_positions({"a": dense()}, value_bits=8).lines()).splitlines()
    for pattern in ("1:2", "2:4", "4:8", "8:16", "16:32"):
        assert sum(line.split()[:1] == [pattern] for line in lines) == 5
    assert any("values counted at 8 bits" in line and "limit is 15.625%" in line for line in lines)


ERRORS = {
    "none": ({}, None, (), "no linear layer"),
    "quarter": ({"a": dense()}, Pattern(1, 4), (), "n:2n up to 32:64, but the model's is 1:4"),
    "unstructured": ({"a": dense()}, Pattern(1, 2, structured=False), (), "the model's is unstructured"),
    "wide": ({"a": dense()}, Pattern(64, 128), (), "the model's is 64:128"),
    "not-pruned": ({"a": dense()}, Pattern(2, 4), (), "`a` of shape (64, 64) is not 2:4"),
    "damaged": ({"a": layer(2), "b": dense()}, Pattern(2, 4), ("a", "b"), "`b` of shape (64, 64) is not 2:4"),
    "unknown": ({"a": dense()}, None, ("a",), "`a` is pruned, but not to any of 1:2, 2:4"),
    "odd": ({"a": dense(8, 7)}, None, (), "in_features=7 is not a multiple of 2."),
    "nan": ({"a": Layer(torch.full((4, 64), torch.nan))}, None, (), "`a` holds values that are not finite"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_counted_is_named(case: str) -> None:
    layers, pattern, pruned, expected = ERRORS[case]
    with pytest.raises(UserError) as caught:
        measure_positions(layers, pattern, pruned=pruned)
    assert expected in str(caught.value)
