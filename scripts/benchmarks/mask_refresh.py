"""What does a mask refresh cost, measured in copies of the matrix?

Ours: the magnitude mask of a float32 weight, compiled and eager, for a Linear and for GPT-2's Conv1D, whose groups run
down the columns; and `refresh_masks` on a layer, which adds the two flip rates and writes the mask. Alternative:
`weight.clone()` of the same tensor. Interleaved pairs.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ast_sparse.kernels.choice import Kernels, compiler_fault
from ast_sparse.kernels.nm_masks import magnitude_mask
from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masks import Pattern, nm_mask
from ast_sparse.sparsity.model import refresh_masks
from scripts.benchmarks.harness import Result, Settings, interleave, main

KERNELS: tuple[Kernels, ...] = ("compiled", "eager")
# pattern, dim of the groups, goal compiled, goal eager
CASES = [(2, 4, 1, 1.0, 8.0), (2, 4, 0, 1.0, 8.0), (4, 8, 1, 4.0, None), (4, 8, 0, 4.0, None)]


def measure(settings: Settings) -> Iterator[Result]:
    rows, columns = (64, 128) if settings.quick else (4096, 11008)
    linear = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(settings.device)
    conv1d = linear.t().contiguous()
    fault = compiler_fault(settings.device.type)
    about: dict[str, Any] = dict(question="mask refresh", against="weight.clone()")
    for n, m, dim, *goals in CASES:
        weight = linear if dim == 1 else conv1d
        for kernels, goal in zip(KERNELS, goals, strict=True):
            case = f"{n}:{m} {'Linear' if dim == 1 else 'Conv1D'} {rows}x{columns}, {kernels}"
            if kernels == "compiled" and fault:
                yield Result(case=case, reason=fault, goal=goal, **about)
                continue
            ours = partial(magnitude_mask, weight, n, m, dim, kernels)
            times = interleave({"ours": ours, "copy": weight.clone}, settings.pairs(20))
            yield Result.of(times["ours"], times["copy"], case=case, goal=goal, **about)

    layer = torch.nn.Linear(columns, rows, bias=False, device=settings.device)
    layer.weight.data.copy_(linear)
    sparse = make_sparse(layer, nm_mask(torch.rand_like(linear)), Pattern(2, 4))
    sparse.kernels = "eager" if fault else "compiled"
    times = interleave({"ours": lambda: refresh_masks(layer), "copy": linear.clone}, settings.pairs(20))
    case = f"2:4 Linear {rows}x{columns}, {sparse.kernels}, with flip rates"
    yield Result.of(times["ours"], times["copy"], case=case, **about)


if __name__ == "__main__":
    main(measure)
