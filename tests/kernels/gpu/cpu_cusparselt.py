"""PyTorch's operators of cuSPARSELt on a CPU, with what they demand of their arguments, for tests without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from ast_sparse.kernels.code24 import pack24, unpack24
from ast_sparse.kernels.gpu import cusparselt


@dataclass
class Calls:
    """Shapes of the weights that were compressed, and of the inputs that were multiplied."""

    compressed: list[tuple[int, ...]] = field(default_factory=list)
    multiplied: list[tuple[int, ...]] = field(default_factory=list)


@contextmanager
def cpu_cusparselt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Inside, the CPU counts as a device with cuSPARSELt. Its form of a weight is our 2:4 code in one tensor."""
    calls = Calls()

    def compress(weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        assert weight.is_contiguous() and weight.dtype in (torch.bfloat16, torch.float16)
        assert rows % 32 == 0 and columns % 64 == 0
        assert int((weight.view(-1, 4) != 0).sum(-1).max()) <= 2  # cuSPARSELt would drop the others without a word
        calls.compressed.append((rows, columns))
        values, meta = pack24(weight)
        return torch.cat([values, meta.view(weight.dtype)], dim=1)

    def multiply(
        compressed: Tensor, dense: Tensor, bias: Tensor | None, alpha: Tensor | None, out_dtype: Any, transposed: bool,
        *others: Any,
    ) -> Tensor:  # fmt: skip
        x = dense.t()
        assert x.is_contiguous() and len(x) % 8 == 0 and x.dtype == compressed.dtype and transposed
        assert bias is None or bias.dtype == x.dtype
        calls.multiplied.append(tuple(x.shape))
        columns = x.shape[1]
        values, meta = compressed.split([columns // 2, columns // 16], dim=1)
        weight = unpack24(values.contiguous(), meta.contiguous().view(torch.uint8))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(cusparselt, "_handles", {})
    monkeypatch.setattr(cusparselt, "fault", lambda device: None)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cslt_compress", compress, "CPU")
        library.impl("_cslt_sparse_mm", multiply, "CPU")
        yield calls
