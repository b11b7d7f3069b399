"""What does an optimizer step with masks and decay cost, compared with dense AdamW?

Ours: `SparseAdamW` on 12 masked float32 matrices of 2048², λ > 0, each placement, compiled and eager. Alternative:
`torch.optim.AdamW(fused=True)` on copies of the same tensors and gradients. Interleaved pairs. Memory: what the first
step, which creates the state, and a second one add to weights, gradients and masks, each side in a child process.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ast_sparse.kernels.choice import Kernels, compiler_fault
from ast_sparse.kernels.updates import PLACEMENTS
from ast_sparse.optim import SparseAdamW
from scripts.benchmarks.harness import PeakMemory, Result, Settings, interleave, main

GOAL = 1.10
OPTIONS: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def build(side: str, kernels: Kernels, count: int, size: int, device: torch.device) -> Callable[[], Any]:
    """The step of one side; `side` is a decay placement, or `adamw`."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, size, generator=generator).to(device)) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.randn(size, size, generator=generator).to(device)
    if side == "adamw":
        return torch.optim.AdamW(weights, fused=True, **OPTIONS).step
    group = {"params": weights, "is_masked": True}
    optimizer = SparseAdamW([group], mask_decay=1e-4, decay_placement=side, **OPTIONS)
    optimizer.kernels = kernels
    optimizer.bind_masks({weight: torch.rand(weight.shape, device=device) < 0.5 for weight in weights})
    return optimizer.step


def peak(side: str, kernels: Kernels, count: int, size: int, device: torch.device) -> float:
    build(side, kernels, 1, 8, device)()  # so that the memory of compiling and of the first threads is not measured
    step = build(side, kernels, count, size, device)
    with PeakMemory() as memory:
        step()
        step()
    return memory.above / 1e6


def measure(settings: Settings) -> Iterator[Result]:
    count, size = (2, 64) if settings.quick else (12, 2048)
    about: dict[str, Any] = dict(question="optimizer step", against="AdamW(fused=True)")
    size_of = (count, size, settings.device)
    dense = build("adamw", "eager", *size_of)
    dense_peak = settings.in_child(peak, "adamw", "eager", *size_of)
    fault = compiler_fault(settings.device.type)
    goals: dict[Kernels, float | None] = {"compiled": GOAL, "eager": None}
    for kernels, goal in goals.items():
        for placement in PLACEMENTS:
            case = f"{placement} {count}x{size}², {kernels}"
            if kernels == "compiled" and fault:
                yield Result(case=case, reason=fault, goal=goal, **about)
                continue
            times = interleave({"ours": build(placement, kernels, *size_of), "dense": dense}, settings.pairs(20))
            yield Result.of(times["ours"], times["dense"], case=case, goal=goal, **about)
            ours_peak = settings.in_child(peak, placement, kernels, *size_of)
            yield Result.of([ours_peak], [dense_peak], case=f"{case}, memory", unit="MB", goal=GOAL, **about)


if __name__ == "__main__":
    main(measure)
