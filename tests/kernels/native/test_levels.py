"""Every level of this CPU against float64, on random cases; `scripts/checks/native_kernels.py` runs many more."""

import pytest
import torch

from ast_sparse.kernels.code24 import same_bits
from ast_sparse.kernels.native.library import of_level, usable_levels
from ast_sparse.kernels.native.products24 import linear
from tests.kernels.native.random24 import DTYPES, NIBBLES, Case, random_case, slow_dense, wrong_entries

LEVELS = usable_levels()


@pytest.mark.parametrize("level", LEVELS)
def test_results_are_those_of_float64_within_rounding(level: str) -> None:
    kernels, wrong = of_level(level), {}
    for seed in range(300):
        case = random_case(seed)
        found = linear(case.x, case.values, case.meta, case.bias, kernels)
        if count := wrong_entries(found, case, level):
            wrong[seed] = f"{case}: {count}"
    assert not wrong


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("tokens", [16, 24, 40, 48, 250, 305])
def test_long_rows_and_many_rows_are_cut_where_they_may_be(level: str, tokens: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    cases = {250: [(130, 1096)], 305: [(20, 960)]}
    for rows, columns in cases.get(tokens, [(150, 1096), (17, 2088), (130, 1024)]):
        x, bias = (torch.randn(size, generator=random).bfloat16() for size in ((tokens, columns), (rows,)))
        values = torch.randn(rows, columns // 2, generator=random).bfloat16()
        nibbles = NIBBLES[torch.randint(6, (rows, columns // 8, 2), generator=random)]
        case = Case(x, values, nibbles[..., 0] | nibbles[..., 1] << 4, bias)
        assert not wrong_entries(linear(x, values, case.meta, bias, of_level(level)), case, level), (rows, columns)


@pytest.mark.parametrize("level", LEVELS)
def test_decoded_weights_have_the_bits_of_the_values(level: str) -> None:
    kernels, random = of_level(level), torch.Generator().manual_seed(0)
    for rows, columns in [(1, 8), (3, 8), (2, 24), (1, 40), (5, 72), (70, 200)]:
        for bits, dtype in ((torch.int16, torch.bfloat16), (torch.int16, torch.float16), (torch.int32, torch.float32)):
            limits = torch.iinfo(bits)
            values = torch.randint(limits.min, limits.max + 1, (rows, columns // 2), generator=random).to(bits)
            nibbles = NIBBLES[torch.randint(6, (rows, columns // 8, 2), generator=random)]
            meta, dense = nibbles[..., 0] | nibbles[..., 1] << 4, torch.full((rows, columns), -1, dtype=bits)
            pointers = (values.data_ptr(), meta.data_ptr(), dense.data_ptr())
            kernels.decode(kernels.index, values.element_size(), *pointers, rows, columns, 1)
            assert same_bits(dense.view(dtype), slow_dense(values.view(dtype), meta))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16])
def test_results_depend_neither_on_threads_nor_on_other_rows(level: str, dtype: torch.dtype, tokens: int) -> None:
    random = torch.Generator().manual_seed(tokens)
    rows, columns = 83, 520
    x = torch.randn(tokens, columns, generator=random).to(dtype)
    values = torch.randn(rows, columns // 2, generator=random).to(dtype)
    nibbles = NIBBLES[torch.randint(6, (rows, columns // 8, 2), generator=random)]
    meta, kernels = nibbles[..., 0] | nibbles[..., 1] << 4, of_level(level)

    def product(first: int, last: int, threads: int) -> torch.Tensor:
        y = torch.full((tokens, last - first), torch.nan, dtype=dtype)
        pointers = (values[first:].data_ptr(), meta[first:].data_ptr(), None, y.data_ptr())
        sizes = (tokens, last - first, columns, threads)
        assert kernels.linear(kernels.index, DTYPES.index(dtype), x.data_ptr(), columns, *pointers, *sizes) == 0
        return y

    whole = product(0, rows, 1)
    assert all(torch.equal(product(0, rows, threads), whole) for threads in (2, 3, 8))
    for first, last in [(0, 1), (1, 4), (5, 83), (82, 83)]:
        assert torch.equal(product(first, last, 1), whole[:, first:last])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_many_tokens_is_that_of_a_few_at_a_time(level: str, dtype: torch.dtype) -> None:
    """Whether threads share the tokens or the rows, and where a long product is cut."""
    random = torch.Generator().manual_seed(0)
    rows, columns, gap = 37, 136, 5
    x = torch.randn(774, columns + gap, generator=random).to(dtype)
    values = torch.randn(rows, columns // 2, generator=random).to(dtype)
    nibbles = NIBBLES[torch.randint(6, (rows, columns // 8, 2), generator=random)]
    meta, kernels = nibbles[..., 0] | nibbles[..., 1] << 4, of_level(level)

    def product(first: int, tokens: int, threads: int) -> torch.Tensor:
        y = torch.full((tokens + 1, rows), torch.nan, dtype=dtype)  # the last row stays
        pointers = (values.data_ptr(), meta.data_ptr(), None, y.data_ptr())
        sizes, start = (tokens, rows, columns, threads), x[first:].data_ptr()
        assert kernels.linear(kernels.index, DTYPES.index(dtype), start, columns + gap, *pointers, *sizes) == 0
        assert y[-1].isnan().all()
        return y[:-1]

    few = torch.cat([product(first, 9, 1) for first in range(0, 774, 9)])
    for tokens in (63, 64, 65, 68, 127, 128, 129, 132, 133, 193, 257, 260, 261, 511, 512, 516, 517, 773):
        for threads in (1, 2, 3):
            assert torch.equal(product(0, tokens, threads), few[:tokens]), (tokens, threads)
