from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ast_sparse import SLoRBConfig, SparsityConfig
from ast_sparse.sparsity.masks import nm_mask
from ast_sparse.sparsity.model import sparsify_model
from ast_sparse.sparsity.pruning import Pruning
from ast_sparse.sparsity.slorb import SLoRB, slorb_init, slorb_svd
from tests.models import tiny_config


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


def pruned_on_inputs(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, what is left of it, and inputs of very different sizes; in float64."""
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(-2, 2, in_features, dtype=torch.float64)
    inputs = torch.randn(200, in_features, generator=generator, dtype=torch.float64) * sizes
    return weight, torch.where(nm_mask(weight.abs()), weight * 1.1, 0), inputs


@pytest.mark.parametrize(("out_features", "in_features"), [(12, 32), (48, 32), (3, 32)])
def test_svd_is_the_best_of_its_rank_on_the_inputs(out_features: int, in_features: int) -> None:
    weight, start, inputs = pruned_on_inputs(out_features, in_features)
    S, X = slorb_svd(weight, start, 8, 2 * inputs.T @ inputs)
    lost = inputs @ (weight - start).T  # Eckart and Young: what is left are the smaller singular values
    best = torch.linalg.svdvals(lost)[4:].square().sum()
    error = (lost - SLoRB(S, X)(inputs)).square().sum()
    torch.testing.assert_close(error, best, rtol=1e-9, atol=1e-18 * float(lost.square().sum()))
    assert S.shape == (out_features, 4) and X.shape == (4, in_features)
    torch.testing.assert_close(S.norm(), X.norm())


def test_svd_without_inputs_is_that_of_the_weights() -> None:
    weight, start, _ = pruned_on_inputs(12, 32)
    S, X = slorb_svd(weight, start, 8, None)
    best = torch.linalg.svdvals(weight - start)[4:].square().sum()
    torch.testing.assert_close((weight - start - S @ X).square().sum(), best)


def test_svd_of_a_layer_that_lost_nothing_adds_nothing() -> None:
    weight, *_ = pruned_on_inputs(12, 32)
    S, X = slorb_svd(weight, weight, 8, None)
    assert bool(S.isfinite().all()) and not SLoRB(S, X)(torch.randn(3, 32, dtype=torch.float64)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_svd_of_16_bit_weights_is_that_of_float32_rounded(dtype: torch.dtype) -> None:
    weight, start, inputs = (each.to(dtype) for each in pruned_on_inputs(12, 32))
    hessian = 2 * inputs.float().T @ inputs.float()
    S, X = slorb_svd(weight, start, 8, hessian)
    exact = slorb_svd(weight.double(), start.double(), 8, hessian.double())
    assert S.dtype == X.dtype == dtype
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close((S @ X).double(), exact[0] @ exact[1], **close)


def test_adapters_are_put_where_their_layers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a model in host memory are calibrated on a GPU, and S and X are made there."""

    def made_elsewhere(self: Any, dense: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = dense.shape
        return torch.zeros(rows, columns // 16), torch.zeros(columns // 16, columns)

    monkeypatch.setattr(Pruning, "_by_groups", made_elsewhere)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    sparsify_model(model, SparsityConfig(), SLoRBConfig(k=16))
    adapters = [module for module in model.modules() if isinstance(module, SLoRB)]
    assert adapters and all(parameter.is_meta for adapter in adapters for parameter in adapter.parameters())
