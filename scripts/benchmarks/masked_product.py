"""What does the mask cost in forward and backward of a step of eight micro-batches?

Ours: the sparse linear layers of SmolLM2-135M (attention and MLP of each of some blocks), eight micro-batches of 256
tokens, gradients accumulated, with and without activation checkpointing of each block. Alternative: the same dense
`nn.Linear` layers. Interleaved pairs; the optimizer's part is in optimizer_step.py.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Result, Settings, interleave, main
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masks import Pattern, nm_mask

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
        times = interleave(sides, settings.pairs(20))
        yield Result.of(
            times["ours"], times["dense"], question="masked product", against="dense nn.Linear", goal=GOAL,
            case=f"{ACCUMULATION}x{tokens} tokens, {'with' if checkpointed else 'no'} checkpointing",
        )  # fmt: skip


if __name__ == "__main__":
    main(measure)
