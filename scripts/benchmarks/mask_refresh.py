"""What does a mask refresh cost, measured in copies of the matrix?

Ours: the magnitude mask of a float32 weight. Alternative: `weight.clone()` of the same tensor. Interleaved pairs.
"""

from collections.abc import Iterator

import torch
from harness import Result, Settings, interleave, main

from ast_sparse.sparsity.masks import nm_mask


def measure(settings: Settings) -> Iterator[Result]:
    shape = (64, 128) if settings.quick else (4096, 11008)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(settings.device)
    for n, m, goal in ((2, 4, 8.0), (4, 8, None)):
        sides = {"ours": lambda n=n, m=m: nm_mask(weight.abs(), n, m), "copy": weight.clone}
        times = interleave(sides, settings.pairs(20))
        yield Result.of(
            times["ours"], times["copy"], question="mask refresh", case=f"{n}:{m} eager {shape[0]}x{shape[1]}",
            against="weight.clone()", goal=goal,
        )  # fmt: skip


if __name__ == "__main__":
    main(measure)
