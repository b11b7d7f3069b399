"""Tests of the Triton kernels in Triton's interpreter; `test_triton24.py` runs this file with TRITON_INTERPRET=1."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from ast_sparse.kernels.code24 import pack24, unpack24
from ast_sparse.kernels.gpu import dispatch, plans, prefill
from ast_sparse.kernels.gpu.plans import Plan
from ast_sparse.kernels.linear24 import linear24
from ast_sparse.kernels.native import products24
from ast_sparse.sparsity.masks import nm_mask

BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ONE, RAGGED = (1, 8), (19, 136)  # rows, columns: one unit; tails of rows and of columns
CASES = [
    (Plan("vectors", 1, 8, 4, 4, 1), 1, BF16, RAGGED),
    (Plan("vectors", 2, 16, 8, 4, 2), 2, FP16, RAGGED),
    (Plan("vectors", 4, 8, 64, 4, 1), 3, FP32, RAGGED),
    (Plan("vectors", 4, 16, 4, 4, 3), 4, BF16, RAGGED),
    (Plan("vectors", 2, 8, 4, 4, 1), 1, FP32, ONE),
    (Plan("tiles", 16, 16, 2, 4, 1), 1, FP32, RAGGED),
    (Plan("tiles", 16, 32, 4, 4, 3), 16, BF16, RAGGED),
    (Plan("tiles", 32, 64, 32, 4, 2), 37, FP16, RAGGED),
    (Plan("tiles", 16, 16, 2, 4, 1), 5, BF16, ONE),
]


@pytest.fixture(autouse=True)
def without_the_kernels_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products24, "takes", lambda *_: False)


def weight24(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return pack24(torch.randn(rows, columns).to(dtype), nm_mask(torch.rand(rows, columns)))


def slow_product(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    """float64, over kept weights only: a pruned one takes no part."""
    out = torch.zeros(len(x), len(values), dtype=torch.float64)
    for row, (kept, codes) in enumerate(zip(values.double(), meta.tolist(), strict=True)):
        places = [
            8 * unit + 4 * half + (code >> 4 * half + 2 * which & 3)
            for unit, code in enumerate(codes) for half, which in itertools.product((0, 1), (0, 1))
        ]  # fmt: skip
        out[:, row] = (x.double()[:, places] * kept).sum(1)
    return out if bias is None else out + bias.double()


def assert_rounded_once(found: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Within half a unit of the last place, plus the rounding of float32 sums of terms that large.

    The interpreter cuts bfloat16 off, where a GPU rounds to the nearest: a whole unit.
    """
    assert found.dtype in DTYPES
    info = torch.finfo(found.dtype)
    bound = (
        (1.0 if found.dtype == torch.bfloat16 else 0.5) * info.eps * expected.abs()
        + 32 * torch.finfo(torch.float32).eps * scale
        + info.smallest_normal
    )
    assert ((found.double() - expected).abs() <= bound).all()


def scale_of(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    return slow_product(x.abs(), values.abs(), meta, None if bias is None else bias.abs())


@pytest.mark.parametrize("plan, tokens, dtype, shape", CASES, ids=str)
def test_products_equal_their_slow_twin(plan: Plan, tokens: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    values, meta = weight24(*shape, dtype)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype) if shape == RAGGED else None
    found = plans.product(x, values, meta, bias, plan)
    assert_rounded_once(found, slow_product(x, values, meta, bias), scale_of(x, values, meta, bias))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_pair_of_positions_is_decoded_as_unpack24_does(dtype: torch.dtype) -> None:
    nibbles = (4, 8, 9, 12, 13, 14)
    meta = torch.tensor([[low + 16 * high] for low in nibbles for high in nibbles], dtype=torch.uint8)
    values = torch.arange(1, 145).view(36, 4).to(dtype)
    dense, columns = unpack24(values, meta), torch.eye(8).to(dtype)
    assert torch.equal(prefill.decode(values, meta), dense)
    assert torch.equal(plans.product(columns, values, meta, None, Plan("tiles", 16, 64, 2, 4, 1)), dense.t())
    for some in (slice(0, 4), slice(4, 8)):
        found = plans.product(columns[some], values, meta, None, Plan("vectors", 4, 64, 2, 4, 1))
        assert torch.equal(found, dense.t()[some])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (19, 264)], ids=str)
def test_decoded_weights_have_the_bits_of_unpack24(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values, meta = weight24(*shape, dtype)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.finfo(dtype).tiny / 4], dtype=dtype)
    values.view(-1)[: min(5, values.numel())] = special[: values.numel()]
    word = torch.int16 if values.element_size() == 2 else torch.int32
    assert torch.equal(prefill.decode(values, meta).view(word), unpack24(values, meta).view(word))


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)  # the interpreter reads subnormal bfloat16 numbers as 0
@pytest.mark.parametrize("plan", [Plan("vectors", 2, 16, 4, 4, 2), Plan("tiles", 16, 16, 4, 4, 2)], ids=str)
def test_nan_inf_and_subnormal_weights_reach_their_own_rows_only(plan: Plan, dtype: torch.dtype) -> None:
    values, meta = weight24(12, 72, dtype)
    values[1, 3], values[2, 34] = torch.nan, torch.inf
    values[3] = torch.finfo(dtype).smallest_normal / 4
    x = torch.rand(2, 72).to(dtype) + 1
    found = plans.product(x, values, meta, None, plan)
    assert found[:, 1].isnan().all() and (found[:, 2] == torch.inf).all() and (found[:, 3] != 0).all()
    finite = [row for row in range(12) if row not in (1, 2)]
    values, meta, found = values[finite], meta[finite], found[:, finite]
    assert_rounded_once(found, slow_product(x, values, meta, None), scale_of(x, values, meta, None))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_an_inf_in_x_passes_pruned_weights_in_vectors_and_not_in_tiles(dtype: torch.dtype) -> None:
    values, meta = weight24(16, 24, dtype)
    x = torch.randn(2, 24).to(dtype)
    x[0, 9], x[1, 5] = torch.inf, torch.nan
    dense = unpack24(values, meta)
    found = plans.product(x, values, meta, None, Plan("vectors", 2, 8, 16, 4, 1))
    for token, column in ((0, 9), (1, 5)):
        assert torch.equal(found[token].isfinite(), dense[:, column] == 0)
    found = plans.product(x, values, meta, None, Plan("tiles", 16, 16, 16, 4, 1))
    assert torch.equal(found[0].isinf(), dense[:, 9] != 0) and torch.equal(found[0].isnan(), dense[:, 9] == 0)
    assert found[1].isnan().all()


@pytest.mark.parametrize("tokens, rank, dtype", [(1, 1, FP16), (4, 33, FP32), (17, 16, BF16)])
def test_slorb_is_added_before_the_result_is_rounded(tokens: int, rank: int, dtype: torch.dtype) -> None:
    values, meta = weight24(40, 72, dtype)
    s, projection = torch.randn(40, rank).to(dtype), torch.randn(rank, 72).to(dtype)
    x, bias = torch.randn(tokens, 72).to(dtype), torch.randn(40).to(dtype)
    found = linear24(x, values, meta, bias, (s, projection))
    thin = torch.nn.functional.linear(x, projection)
    expected = slow_product(x, values, meta, bias) + thin.double() @ s.double().T
    scale = scale_of(x, values, meta, bias) + thin.double().abs() @ s.double().abs().T
    assert_rounded_once(found, expected, scale)


def test_slorb_is_also_added_to_a_prefill() -> None:
    values, meta = weight24(8, 16, BF16)
    s, projection, x = torch.randn(8, 2).to(BF16), torch.randn(2, 16).to(BF16), torch.randn(300, 16).to(BF16)
    found = linear24(x, values, meta, None, (s, projection))
    expected = slow_product(x, values, meta, None) + x.double() @ projection.double().T @ s.double().T
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=16 * torch.finfo(BF16).eps * expected.abs().max())


@pytest.mark.parametrize("rows, columns", [(32, 64), (96, 192)])
def test_metadata_is_reordered_as_pytorch_does_for_cutlass(rows: int, columns: int) -> None:
    values, meta = weight24(rows, columns, torch.float16)
    packed, reordered = sparse_semi_structured_from_dense_cutlass(unpack24(values, meta))
    assert torch.equal(packed, values)
    assert torch.equal(prefill.cutlass_metadata(meta), reordered)


def test_a_weight_larger_than_the_workspace_is_decoded_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_WORKSPACE", 64 * 16)
    values, meta = weight24(150, 16, torch.float32)  # blocks of 64, 64 and 22 rows
    x, bias = torch.randn(5, 16), torch.randn(150)
    for each in (bias, None):
        found = prefill.decoded(x, values, meta, each)
        assert_rounded_once(found, slow_product(x, values, meta, each), scale_of(x, values, meta, each))


def test_linear24_uses_the_kernels_for_any_shape_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, ...]] = []
    by_kernels = dispatch.linear

    def product(x: Tensor, *others: Any) -> Tensor:
        used.append(tuple(x.shape))
        return by_kernels(x, *others)

    monkeypatch.setattr(dispatch, "linear", product)
    values, meta = weight24(20, 64, torch.bfloat16)
    for shape in ((64,), (2, 5, 64), (257, 64)):
        x = torch.randn(*shape).to(torch.bfloat16)
        assert dispatch.takes(x, values, meta)
        found, flat = linear24(x, values, meta), x.reshape(-1, 64)
        assert found.shape == (*shape[:-1], 20)
        assert_rounded_once(
            found.reshape(-1, 20), slow_product(flat, values, meta, None), scale_of(flat, values, meta, None)
        )
    strided = torch.randn(64, 6).to(torch.bfloat16).t()
    shifted = torch.randn(6 * 64 + 1).to(torch.bfloat16)[1:].view(6, 64)  # does not start at a word
    for x in (strided, shifted):
        assert_rounded_once(
            linear24(x, values, meta), slow_product(x, values, meta, None), scale_of(x, values, meta, None)
        )
    assert torch.equal(torch.ops.ast_sparse.linear24(strided, values, meta, None), linear24(strided, values, meta))
    assert used == [(64,), (2, 5, 64), (257, 64), *[(6, 64)] * 4]


def test_what_the_kernels_cannot_do_is_left_to_the_plain_way() -> None:
    values, meta = weight24(8, 16, torch.float32)
    x = torch.randn(2, 16)
    assert dispatch.takes(x, values, meta) and dispatch.takes(x, values, meta, torch.randn(8))
    assert not dispatch.takes(x.double(), values.double(), meta)
    assert not dispatch.takes(x.half(), values, meta)
    assert not dispatch.takes(x, values, meta, torch.randn(8).half())
    assert not dispatch.takes(x, values, meta, torch.randn(7))
    s, projection = torch.randn(8, 3), torch.randn(3, 16)
    assert dispatch.takes(x, values, meta, None, (s, projection))
    assert not dispatch.takes(x, values, meta, None, (s, projection[:2]))
    assert not dispatch.takes(x, values, meta, None, (s, projection.half()))
    assert not dispatch.takes(x[:, :8], values, meta)
    assert not dispatch.takes(x[:0], values, meta)
    assert not dispatch.takes(x, values.t().contiguous().t(), meta)
    assert not dispatch.takes(x, torch.randn(65)[1:].view(8, 8), meta)  # values do not start at a word
    with torch.autocast("cpu", torch.bfloat16):
        assert not dispatch.takes(x, values, meta)
