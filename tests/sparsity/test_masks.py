import itertools

import pytest
import torch

from ast_sparse.sparsity.masks import Pattern, check_nm, flip_rate, gradual_mask, nm_mask
from tests.sparsity.slow_masks import slow_mask

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (8, 16), (16, 32)]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mask_equals_sorting_each_group(n: int, m: int, dtype: torch.dtype) -> None:
    scores = torch.randn(6, 4 * m, generator=torch.Generator().manual_seed(n * m)).abs().to(dtype)
    assert torch.equal(nm_mask(scores, n, m), slow_mask(scores, n, m))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_ties_keep_the_lower_column(n: int, m: int) -> None:
    scores = torch.randint(0, 3, (8, 4 * m), generator=torch.Generator().manual_seed(m)).float()
    assert torch.equal(nm_mask(scores, n, m), slow_mask(scores, n, m))


def test_every_order_of_four_values_with_ties_is_right() -> None:
    scores = torch.tensor(list(itertools.product([0.0, 1.0, 2.0, 3.0], repeat=4)))
    assert torch.equal(nm_mask(scores), slow_mask(scores, 2, 4))


def test_leading_dimensions_are_kept() -> None:
    scores = torch.randn(3, 5, 8)
    assert torch.equal(nm_mask(scores), nm_mask(scores.reshape(15, 8)).reshape(3, 5, 8))


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 6), (0, 4, 8), (4, 4, 8), (5, 4, 8)])
def test_a_pattern_that_does_not_fit_is_refused(n: int, m: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"{n}:{m}"):
        nm_mask(torch.rand(2, columns), n, m)


def test_check_nm_counts_non_zeros_along_the_given_dimension() -> None:
    weight = torch.tensor([[1.0, 2, 0, 0, 0, 0, 3, 4]])
    assert check_nm(weight, 2, 4)
    assert check_nm(weight.t(), 2, 4, dim=0)
    weight[0, 2] = 1
    assert not check_nm(weight, 2, 4)
    assert not check_nm(weight.t(), 2, 4, dim=0)
    assert not check_nm(torch.zeros(2, 6), 2, 4)


def test_flip_rate_counts_changed_positions() -> None:
    before = torch.tensor([[True, True, False, False, True, True, False, False]])
    after = torch.tensor([[True, False, True, False, True, True, False, False]])
    assert flip_rate(after, before) == 2 / 8


GRADUAL = [Pattern(2, 4), Pattern(1, 4), Pattern(16, 32), Pattern(1, 2, structured=False)]


def slow_gradual_mask(scores: torch.Tensor, pattern: Pattern, sparsity: float) -> torch.Tensor:
    """Plain loops: prunes the lowest scores of the layer one by one, if the pattern prunes them too."""
    flat = scores.flatten().tolist()
    prunable = (~pattern.mask(scores)).flatten().tolist()
    order = sorted((i for i in range(len(flat)) if prunable[i]), key=lambda i: (flat[i], i))
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[order[: round(sparsity * len(flat))]] = False
    return mask.view_as(scores)


@pytest.mark.parametrize("pattern", GRADUAL, ids=str)
def test_gradual_mask_prunes_the_lowest_scores_that_the_pattern_prunes(pattern: Pattern) -> None:
    scores = torch.randint(0, 40, (6, 64), generator=torch.Generator().manual_seed(1)).float()  # with ties
    for sparsity in (0.0, 0.1, 0.33, 0.49):
        mask = gradual_mask(scores, pattern, sparsity)
        assert torch.equal(mask, slow_gradual_mask(scores, pattern, sparsity))
        assert int((~mask).sum()) == round(sparsity * 384)
    assert torch.equal(gradual_mask(scores, pattern, pattern.sparsity), pattern.mask(scores))


@pytest.mark.parametrize("pattern", GRADUAL, ids=str)
def test_what_is_pruned_stays_pruned_while_scores_change_and_ends_in_the_pattern(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(6, 64, dtype=torch.bool)
    for share in (0.0, 0.2, 0.5, 0.5, 0.9, 0.7, 1.0):  # falls once, as in a resumed run that was made longer
        scores = torch.where(mask, torch.rand(6, 64, generator=generator), -1)
        new = gradual_mask(scores, pattern, share * pattern.sparsity)
        assert not (new & ~mask).any()
        assert int((~new).sum()) == max(round(share * pattern.sparsity * 384), int((~mask).sum()))
        mask = new
    assert int((~mask).sum()) == 384 * pattern.sparsity and pattern.holds(mask)


def test_unstructured_keeps_the_upper_half_of_a_layer_wherever_it_is() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5], [1, 1, 1, 1, 9]])
    mask = Pattern(1, 2, structured=False).mask(scores)
    assert mask.tolist() == [[True] * 4 + [False], [False] * 4 + [True]]
    odd = Pattern(1, 2, structured=False).mask(torch.ones(3, 3))
    assert odd.flatten().tolist() == [True] * 4 + [False] * 5  # half rounded down is kept, ties by position
