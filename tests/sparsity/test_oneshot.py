"""One-shot pruning against slow twins in float64 that follow the definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ast_sparse.config import CalibrationConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import Pattern, check_nm
from ast_sparse.sparsity.oneshot import prune_layer, settle, sparsegpt_prune, wanda_mask
from ast_sparse.sparsity.statistics import InputStatistics


def random_layer(rows: int, columns: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and inputs whose columns are correlated and of different scale; float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    scale = torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    inputs = (
        torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(columns)) * scale
    )
    return weight, inputs


def slow_sparsegpt(weight: Tensor, hessian: Tensor, n: int, m: int, damping: float) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon column by column, each time with a new inverse of the rest of the Hessian."""
    weight, hessian = weight.clone(), hessian.clone()
    rows, columns = weight.shape
    for j in range(columns):
        if hessian[j, j] == 0:
            hessian[j, j] = 1
            weight[:, j] = 0
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    mask = torch.ones(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if j % m == 0:
            for row in range(rows):
                cost = {c: float(weight[row, c] ** 2 / inverses[c][0, 0]) for c in range(j, j + m)}
                for c in sorted(cost, key=lambda c: (cost[c], -c))[: m - n]:
                    mask[row, c] = False
        for row in range(rows):
            if not mask[row, j]:
                weight[row, j:] -= weight[row, j].clone() / inverses[j][0, 0] * inverses[j][0]
                weight[row, j] = 0
    return weight, mask


@pytest.mark.parametrize(
    ("n", "m", "block_size"), [(2, 4, 8), (2, 4, 128), (1, 2, 5), (4, 8, 16), (1, 4, 12), (3, 6, 4)]
)
def test_sparsegpt_equals_the_surgeon_that_inverts_again_for_every_column(n: int, m: int, block_size: int) -> None:
    weight, inputs = random_layer(6, 24, 60, seed=m + block_size)
    expected, mask = slow_sparsegpt(weight, inputs.T @ inputs, n, m, 0.01)
    found, found_mask = sparsegpt_prune(weight, inputs.T @ inputs, n, m, block_size=block_size)
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert bool((found[~mask] == 0).all()) and not bool(found[~mask].signbit().any())


def test_sparsegpt_in_float32_agrees_with_float64_to_1e_4() -> None:
    weight, inputs = random_layer(32, 64, 400, seed=0)
    weight, inputs = weight.float(), inputs.float()
    exact, mask = sparsegpt_prune(weight.double(), inputs.double().T @ inputs.double())
    found, found_mask = sparsegpt_prune(weight, inputs.T @ inputs)
    assert found.dtype == torch.float32 and torch.equal(found_mask, mask)
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-4


def test_sparsegpt_gives_a_smaller_output_error_than_wanda_and_wanda_than_magnitude() -> None:
    weight, inputs = random_layer(64, 64, 500, seed=1)
    target = inputs @ weight.T
    error = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        statistics = InputStatistics(64, True, torch.device("cpu"))
        statistics.add(inputs.float())
        result = prune_layer("x", weight.float(), method, Pattern(2, 4), statistics)
        pruned = torch.where(result.mask, result.weight, 0).double()
        error[method] = float((target - inputs @ pruned.T).square().sum() / target.square().sum())
        if method == "sparsegpt":
            assert result.error == pytest.approx(error[method], rel=1e-4)
    assert error["sparsegpt"] < error["wanda"] < error["magnitude"]


@pytest.mark.parametrize("dead", [(3,), (0, 1), (4, 5, 6, 7)])
def test_a_dead_input_column_gets_weight_zero_and_disturbs_nothing(dead: tuple[int, ...]) -> None:
    weight, inputs = random_layer(5, 16, 50, seed=2)
    inputs[:, list(dead)] = 0
    expected, _ = slow_sparsegpt(weight, inputs.T @ inputs, 2, 4, 0.01)
    found, mask = sparsegpt_prune(weight, inputs.T @ inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert bool((found[:, list(dead)] == 0).all()) and check_nm(mask, 2, 4)


def test_damping_makes_more_columns_than_tokens_work() -> None:
    weight, inputs = random_layer(8, 32, 10, seed=3)  # rank 10 of 32
    found, mask = sparsegpt_prune(weight.float(), (inputs.T @ inputs).float())
    assert bool(torch.isfinite(found).all()) and check_nm(mask, 2, 4)


def test_a_singular_hessian_without_damping_is_one_line_that_names_the_layer_and_the_fix() -> None:
    statistics = InputStatistics(16, True, torch.device("cpu"))
    statistics.add(torch.ones(4, 16))  # rank 1
    with pytest.raises(UserError, match=r"`h\.0\.up`: .*damping=0.*Raise calibration\.damping"):
        prune_layer(
            "h.0.up", torch.randn(8, 16), "sparsegpt", Pattern(2, 4), statistics, CalibrationConfig(damping=0.0)
        )


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_not_finite_are_refused_by_layer_name(method: str) -> None:
    statistics = InputStatistics(8, method == "sparsegpt", torch.device("cpu"))
    statistics.add(torch.full((3, 8), torch.inf))
    with pytest.raises(UserError, match="`q` gets inputs that are not finite"):
        prune_layer("q", torch.randn(4, 8), method, Pattern(2, 4), statistics)  # type: ignore[arg-type]


def test_unstructured_sparsegpt_prunes_the_lowest_half_of_each_block_of_columns() -> None:
    weight, inputs = random_layer(6, 32, 80, seed=4)
    hessian = inputs.T @ inputs
    _, mask = sparsegpt_prune(weight, hessian, 1, 2, block_size=8, structured=False)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(32)
    cost = weight[:, :8] ** 2 / torch.stack([torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(8)])
    assert torch.equal(mask[:, :8], cost > cost.flatten().sort().values[24])  # as published, one more than half
    assert all(int(mask[:, j : j + 8].sum()) == 23 for j in range(0, 32, 8))


def test_unstructured_sparsegpt_prunes_all_scores_that_equal_the_threshold() -> None:
    weight = (2 * random_layer(6, 32, 1, seed=4)[0]).round()
    _, mask = sparsegpt_prune(weight, torch.eye(32, dtype=torch.float64), 1, 2, structured=False)
    assert torch.equal(mask, weight.abs() > weight.abs().flatten().kthvalue(97).values)


class Deterministic(TorchDispatchMode):
    """Inside, operations fail that have no deterministic way on a GPU, as under `full_determinism` there."""

    _refused = ("kthvalue", "median", "nanmedian", "histc", "put", "put_", "cumsum")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self._refused
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 2, structured=False)], ids=str)
def test_every_method_has_a_deterministic_way_on_a_gpu(method: str, pattern: Pattern) -> None:
    weight, inputs = random_layer(6, 32, 80, seed=4)
    statistics = InputStatistics(32, True, torch.device("cpu"))
    with Deterministic():
        statistics.add(inputs.float())
        prune_layer("x", weight.float(), method, pattern, statistics)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (8, 16), (1, 4)])
def test_wanda_keeps_the_highest_products_of_weight_and_input_norm(n: int, m: int) -> None:
    weight, inputs = random_layer(7, 32, 40, seed=m)
    mask = wanda_mask(weight, inputs.norm(dim=0), n, m)
    for row in range(7):
        for start in range(0, 32, m):
            scores = [
                abs(float(weight[row, j])) * float(inputs[:, j].square().sum()) ** 0.5 for j in range(start, start + m)
            ]
            kept = sorted(range(m), key=lambda j: -scores[j])[:n]
            assert mask[row, start : start + m].nonzero().flatten().tolist() == sorted(kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_get_the_masks_and_errors_of_their_values(dtype: torch.dtype) -> None:
    """The inputs have norms and squares that float16 cannot hold."""
    weight, inputs = random_layer(64, 64, 100, seed=3)
    weight, inputs = 8 * weight.to(dtype), (1e4 * inputs).float()
    weight[0] = 0
    statistics = InputStatistics(64, True, weight.device)
    statistics.add(inputs)
    values, norm = weight.double(), inputs.double().norm(dim=0)
    assert torch.equal(wanda_mask(weight, statistics.input_norm), wanda_mask(values, norm))
    for method in ("magnitude", "wanda", "sparsegpt"):
        found = prune_layer("layer", weight, method, Pattern(2, 4), statistics)
        seen = torch.eye(64).double() if method == "magnitude" else inputs.double()
        seen = norm.diag() if method == "wanda" else seen
        lost = values - torch.where(found.mask, found.weight.double(), 0)
        expected = (seen @ lost.T).square().sum() / (seen @ values.T).square().sum()
        assert found.error == pytest.approx(float(expected), rel=1e-3)


def test_unstructured_wanda_keeps_half_of_each_row() -> None:
    weight, inputs = random_layer(5, 12, 30, seed=5)
    mask = wanda_mask(weight, inputs.norm(dim=0), 1, 2, structured=False)
    scores = weight.abs() * inputs.norm(dim=0)
    assert mask.sum(1).tolist() == [6] * 5
    assert bool((torch.where(mask, scores, torch.inf).amin(1) > torch.where(mask, 0, scores).amax(1)).all())


def test_settled_weights_stay_below_the_smallest_kept_one_of_their_group_with_their_sign() -> None:
    weight = torch.tensor([[4.0, -3.0, 0.5, -2.0, 1.0, 0.125, -5.0, 0.0]])
    mask = torch.tensor([[False, True, True, False, False, True, False, True]])
    assert settle(weight, mask, Pattern(2, 4)).tolist() == [[0.125, -3.0, 0.5, -0.125, 0.0, 0.125, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, h: sparsegpt_prune(w, h[:4, :4]), r"hessian \(4, 4\) does not fit weight \(3, 8\)"),
        (lambda w, h: sparsegpt_prune(w[:, :6], h[:6, :6], 2, 4), "6 columns are not a multiple of 4"),
        (lambda w, h: wanda_mask(w, torch.ones(5)), r"input_norm \(5,\) does not fit weight \(3, 8\)"),
        (lambda w, h: wanda_mask(w, torch.ones(8), 4, 4), "pattern 4:4 needs 0 < N < M"),
    ],
)
def test_shapes_and_patterns_that_do_not_fit_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 8), torch.eye(8))  # type: ignore[operator]


def slow_sparsegpt_with_zeros(weight: Tensor, hessian: Tensor, n: int, m: int, damping: float) -> tuple[Tensor, Tensor]:
    """As `slow_sparsegpt`, but zeros of `weight` are pruned first, and can only be kept as zeros."""
    zeros, weight = weight == 0, weight.clone()
    columns = weight.shape[1]
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    mask = torch.ones_like(zeros)
    for row, start in ((row, start) for row in range(len(weight)) for start in range(0, columns, m)):
        for j in range(start, start + m):
            if j == start:
                cost = {c: (not zeros[row, c], float(weight[row, c] ** 2 / inverses[c][0, 0])) for c in range(j, j + m)}
                cost = {c: value if value[0] else (False, 0.0) for c, value in cost.items()}
                mask[row, sorted(cost, key=lambda c: (cost[c], -c))[: m - n]] = False
            if zeros[row, j] or not mask[row, j]:
                weight[row, j:] -= weight[row, j].clone() / inverses[j][0, 0] * inverses[j][0]
                weight[row, j] = 0
    return weight, mask


@pytest.mark.parametrize(("n", "m", "block_size"), [(2, 4, 8), (2, 4, 128), (1, 2, 5), (4, 8, 16), (3, 6, 4)])
def test_given_zeros_stay_zero_under_sparsegpt(n: int, m: int, block_size: int) -> None:
    weight, inputs = random_layer(12, 24, 60, seed=m + block_size)
    zeros = torch.rand(12, 24, generator=torch.Generator().manual_seed(m)) < 0.65
    weight[zeros] = 0
    hessian = inputs.T @ inputs
    expected, mask = slow_sparsegpt_with_zeros(weight, hessian, n, m, 0.01)
    found, found_mask = sparsegpt_prune(weight, hessian, n, m, block_size=block_size, keep_zeros=True)
    assert torch.equal(found_mask, mask) and bool((mask.unflatten(1, (-1, m)).sum(-1) == n).all())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert bool((found[zeros] == 0).all()) and not bool(found[zeros].signbit().any()) and check_nm(found, n, m)
    assert int(found.count_nonzero()) == int(
        torch.minimum((~zeros).unflatten(1, (-1, m)).sum(-1), torch.tensor(n)).sum()
    )
    revived, _ = sparsegpt_prune(weight, hessian, n, m, block_size=block_size)
    assert bool((revived[zeros] != 0).any())  # what the option is for


def test_without_zeros_the_option_changes_nothing() -> None:
    weight, inputs = random_layer(6, 24, 60, seed=5)
    for found, kept in zip(
        sparsegpt_prune(weight, inputs.T @ inputs),
        sparsegpt_prune(weight, inputs.T @ inputs, keep_zeros=True),
        strict=True,
    ):
        assert torch.equal(found, kept)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 2, structured=False)], ids=str)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_given_zeros_stay_zero_in_every_method_and_pattern(method: str, pattern: Pattern, share: float) -> None:
    weight, inputs = random_layer(16, 32, 100, seed=6)
    zeros = torch.rand(16, 32, generator=torch.Generator().manual_seed(1)) < share
    weight[zeros] = 0
    statistics = InputStatistics(32, True, torch.device("cpu"))
    statistics.add(inputs.float())
    settings = CalibrationConfig(keep_zeros=True, block_size=8)
    result = prune_layer("x", weight.float(), method, pattern, statistics, settings)  # type: ignore[arg-type]
    pruned = torch.where(result.mask, result.weight, 0)
    assert bool((pruned[zeros] == 0).all()) and pattern.holds(pruned)
    if pattern.structured:
        groups = (~zeros).unflatten(1, (-1, 4)).sum(-1).clamp(max=2)
        assert torch.equal(pruned.count_nonzero(), groups.sum())  # no zero takes the place of another weight
