"""What does a dense layer cost, forward and backward, with the library's products, compared with `F.linear`?

Ours: `kernels.products.linear`, which uses oneDNN on AMD CPUs with AVX-512; elsewhere both sides are the same. Float32,
layers of GPT-2 124M and SmolLM2-135M, 1024 tokens, gradients with respect to input and weight. Interleaved pairs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.kernels.products import linear
from scripts.benchmarks.harness import Result, Settings, interleave, main

SHAPES = ((768, 3072), (3072, 768), (576, 1536), (576, 576))  # in, out


def layer(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        output = function(x, weight)
        return torch.autograd.grad(output, (x, weight), output.detach())

    return run


def measure(settings: Settings) -> Iterator[Result]:
    tokens, shapes = (8, SHAPES[-1:]) if settings.quick else (1024, SHAPES)
    for inputs, outputs in shapes:
        x = torch.randn(tokens, inputs, device=settings.device, requires_grad=True)
        weight = torch.randn(outputs, inputs, device=settings.device, requires_grad=True)
        sides = {"ours": layer(linear, x, weight), "torch": layer(F.linear, x, weight)}
        times = interleave(sides, settings.pairs(20))
        about: dict[str, Any] = dict(question="matrix product", against="F.linear")
        yield Result.of(times["ours"], times["torch"], case=f"{tokens} tokens, {inputs} to {outputs}", **about)


if __name__ == "__main__":
    main(measure)
