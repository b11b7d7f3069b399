"""Does a linear layer with a compressed 2:4 weight run faster than the dense one?

`linear24` with values and positions in memory, against `F.linear` with the dense weight, and against oneDNN with the
weight packed once, which is the product of vLLM on a CPU. bfloat16; shapes of SmolLM2-135M and of a LLaMA of 1.17 B
parameters; one token is decoding, 512 are a prompt. Each call takes another copy of the layer, so that weights come
from memory as in a model. Large layers lie as they do in a model: kept values in huge pages, if Linux grants them, and
dense weights where PyTorch puts them. By bytes, one token could take 9/16 of the time of a dense product at the same
bandwidth.
"""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.kernels.code24 import pack24
from ast_sparse.kernels.linear24 import linear24
from ast_sparse.sparsity.masks import Pattern
from scripts.benchmarks.harness import Result, Settings, interleave, main

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (11264, 2048), (2048, 5632))  # [out, in]
TOKENS = (1, 2, 4, 8, 16, 512)
BOUND = 9 / 16  # bytes of a compressed bfloat16 weight, of the dense one
_LAYERS = 200 << 20  # bytes of dense copies of a layer: several times the cache of the last level
_MOST = 32  # copies; those of all sides, 54 MB for the smallest layer, lie between two uses of one


def measure(settings: Settings) -> Iterator[Result]:
    """Each shape, number of tokens and number of threads against both alternatives."""
    shapes, tokens = (((16, 64),), (1, 5)) if settings.quick else (SHAPES, TOKENS)
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            for out_features, in_features in shapes:
                for count in tokens:
                    yield from _compare(settings, out_features, in_features, count, threads)
    finally:
        torch.set_num_threads(before)


def _compare(settings: Settings, out_features: int, in_features: int, tokens: int, threads: int) -> Iterator[Result]:
    copies = 1 if settings.quick else min(max(_LAYERS // (2 * out_features * in_features), 1), _MOST)
    weight = torch.randn(out_features, in_features)
    weight = (weight * Pattern(2, 4).mask(weight.abs())).bfloat16()
    dense = [weight.clone() for _ in range(copies)]
    codes = [pack24(each) for each in dense]
    x = torch.randn(tokens, in_features).bfloat16()
    sides: dict[str, Callable[[], Any]] = {
        "compressed": _each(codes, lambda code: linear24(x, *code)),
        "F.linear": _each(dense, lambda weight: F.linear(x, weight)),
    }
    if torch.backends.mkldnn.is_available():
        packed = [torch.ops.mkldnn._reorder_linear_weight(each, None) for each in dense]
        sides["oneDNN, packed"] = _each(
            packed, lambda weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        )
    with torch.inference_mode():
        times = interleave(sides, settings.pairs(30 if tokens > 16 else 100))
    case = f"{out_features} x {in_features}, {tokens} tokens, {threads} threads"
    for name in sides:
        if name != "compressed":
            goal = 1.0 if tokens <= 16 else 1 / 0.95
            yield Result.of(
                times["compressed"], times[name], question="2:4 product", case=case, against=name, goal=goal,
                notes={"bound_by_bytes": BOUND},
            )  # fmt: skip


def _each(layers: list[Any], product: Callable[[Any], Tensor]) -> Callable[[], Tensor]:
    """The product with the next layer, in turn."""
    turn = cycle(layers)
    return lambda: product(next(turn))


if __name__ == "__main__":
    main(measure)
