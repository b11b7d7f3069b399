import pytest
import torch

from ast_sparse.sparsity.masks import nm_mask
from ast_sparse.sparsity.slorb import SLoRB, slorb_init


@pytest.mark.parametrize("k", [4, 8, 16])
def test_init_follows_equations_5_and_6(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    mask = nm_mask(weight.abs())
    S, X = slorb_init(weight, torch.where(mask, weight, 0), k)
    for i in range(32 // k):
        for j in range(32):
            assert X[i, j] == (1.0 if i * k <= j <= (i + 1) * k - 1 else 0.0)
    for i in range(6):
        for j in range(32 // k):
            expected = sum(float(weight[i, p]) for p in range(j * k, (j + 1) * k) if not mask[i, p]) / k
            assert S[i, j] == pytest.approx(expected, rel=1e-12)


def test_mean_init_keeps_the_output_for_inputs_constant_within_a_group() -> None:
    weight = torch.randn(6, 32, dtype=torch.float64)
    start = torch.where(nm_mask(weight.abs()), weight, 0)
    adapter = SLoRB(*slorb_init(weight, start, 8))
    x = torch.randn(3, 4, dtype=torch.float64).repeat_interleave(8, dim=1)
    torch.testing.assert_close(x @ start.T + adapter(x), x @ weight.T)


def test_pruned_sum_comes_from_the_dense_weight_when_the_start_weight_was_updated() -> None:
    dense, start = torch.full((1, 4), 2.0), torch.tensor([[3.0, 0.0, 1.0, 0.0]])
    S, _ = slorb_init(dense, start, 4)
    assert S.item() == (8.0 - 4.0) / 4


def test_zero_init_changes_nothing() -> None:
    S, X = slorb_init(torch.randn(6, 32), torch.zeros(6, 32), 8, "zero")
    assert not SLoRB(S, X)(torch.randn(3, 32)).any()


def test_projection_is_trained_only_if_asked() -> None:
    S, X = slorb_init(torch.randn(6, 32), torch.zeros(6, 32), 8)
    assert SLoRB(S, X).X.requires_grad and not SLoRB(S, X, train_projection=False).X.requires_grad


def test_k_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"slorb\.k=5 does not divide in_features=32"):
        slorb_init(torch.randn(6, 32), torch.zeros(6, 32), 5)
