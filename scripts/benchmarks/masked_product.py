"""What does the mask cost in the forward and backward passes of a step of eight micro-batches?

Ours: the sparse linear layers of SmolLM2-135M (attention and MLP of a few blocks), eight micro-batches of 256 tokens,
gradients accumulated, with and without activation checkpointing of each block. Alternative: the same layers as dense
`nn.Linear`, multiplied by PyTorch; and, because our products are faster than that on some CPUs, the dense layers with
our products, which shows what the mask alone costs. Interleaved pairs; the optimizer's part is in optimizer_step.py.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masks import Pattern, nm_mask
from scripts.benchmarks.harness import Result, Settings, interleave, main

GOAL = 1.03
ACCUMULATION = 8


class Block(nn.Module):
    """The matrix products of a decoder block: width x (q, k, v, o) and the gated MLP; no attention, no norms."""

    def __init__(self, width: int, kv: int, inner: int) -> None:
        super().__init__()
        sizes = [(width, width), (width, kv), (width, kv), (width, width), (width, inner), (width, inner)]
        self.layers = nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, o, gate, up = self.layers
        x = x + o(q(x)) + torch.cat([k(x), v(x)], -1).sum(-1, keepdim=True)
        return x + self.down(torch.nn.functional.silu(gate(x)) * up(x))


def step(blocks: nn.ModuleList, batches: Tensor, checkpointed: bool) -> Callable[[], Any]:
    def run() -> None:
        for parameter in blocks.parameters():
            parameter.grad = None
        for x in batches:
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            x.mean().backward()

    return run


def fast(call: Callable[[], Any], model: nn.Module) -> Callable[[], Any]:
    def run() -> None:
        with fast_forward(model):
            call()

    return run


def measure(settings: Settings) -> Iterator[Result]:
    count, width, kv, inner, tokens = (1, 32, 16, 48, 8) if settings.quick else (3, 576, 192, 1536, 256)
    torch.manual_seed(0)
    dense = nn.ModuleList(Block(width, kv, inner) for _ in range(count)).to(settings.device)
    sparse = copy.deepcopy(dense)
    for layer in [module for module in sparse.modules() if isinstance(module, nn.Linear)]:
        make_sparse(layer, nm_mask(layer.weight.abs()), Pattern(2, 4))
    batches = torch.randn(ACCUMULATION, tokens, width, device=settings.device, requires_grad=True)
    for checkpointed in (False, True):
        sides = {"ours": step(sparse, batches, checkpointed), "dense": step(dense, batches, checkpointed)}
        sides["same"] = fast(sides["dense"], dense)
        times = interleave(sides, settings.pairs(20))
        case = f"{ACCUMULATION}x{tokens} tokens, {'with' if checkpointed else 'no'} checkpointing"
        for other, against, goal in (("dense", "dense nn.Linear", GOAL), ("same", "dense, same products", None)):
            about: dict[str, Any] = dict(question="masked product", against=against, goal=goal)
            yield Result.of(times["ours"], times[other], case=case, **about)


if __name__ == "__main__":
    main(measure)
