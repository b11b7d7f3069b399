"""Every level of this CPU against float64, on random cases; `scripts/checks/native_kernels.py` runs many more."""

import pytest
import torch

from ast_sparse.kernels.code24 import same_bits
from ast_sparse.kernels.native.library import of_level, usable_levels
from ast_sparse.kernels.native.products24 import linear
from tests.kernels.native.random24 import DTYPES, NIBBLES, random_case, slow_dense, wrong_entries

LEVELS = list(usable_levels())


@pytest.mark.parametrize("level", LEVELS)
def test_results_are_those_of_float64_within_rounding(level: str) -> None:
    kernels, wrong = of_level(level), {}
    for seed in range(300):
        case = random_case(seed)
        found = linear(case.x, case.values, case.meta, case.bias, kernels)
        if count := wrong_entries(found, case, flushes=level == "avx512_bf16" and found.dtype == torch.bfloat16):
            wrong[seed] = f"{case}: {count}"
    assert not wrong
