"""What does an optimizer step with masks and decay cost, compared with dense AdamW?

Ours: `SparseAdamW` on 12 masked float32 matrices of 2048², λ > 0, each placement, compiled and eager. Alternative:
`torch.optim.AdamW(fused=True)` on copies of the same tensors and gradients. Interleaved pairs. Memory: what the first
step, which creates the state, and a second one add to weights, gradients and masks, each side in a child process.

And what do `optimizer.moments: 8bit` and `optimizer.offload` cost? Each beside `SparseAdamW` with float32 moments on
the device, of matrices of that size, and the bytes of the moments of one weight. Without a GPU, offload copies from the
host to the host, and the CPU codes the 8-bit moments, which are meant for a GPU.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from ast_sparse.kernels import moments8bit
from ast_sparse.kernels.choice import Kernels, compiler_fault
from ast_sparse.kernels.updates import PLACEMENTS
from ast_sparse.optim import SparseAdamW
from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import masks_by_parameter
from ast_sparse.sparsity.offload import OffloadedAdamW
from scripts.benchmarks.harness import PeakMemory, Result, Settings, interleave, main

GOAL = 1.10
State = Literal["float32", "8bit", "offload"]
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


def build_state(state: State, kernels: Kernels, count: int, size: int, device: torch.device) -> SparseAdamW:
    """An optimizer with gradients; `state` is `float32`, `8bit` or `offload`."""
    model = torch.nn.Sequential(*(torch.nn.Linear(size, size, bias=False, device=device) for _ in range(count)))
    for layer in model:
        make_sparse(layer, torch.rand(size, size, device=device) < 0.5, Pattern(2, 4))
        layer.weight.grad = torch.randn(size, size, device=device)
    masks, options = masks_by_parameter(model), {**OPTIONS, "mask_decay": 1e-4}
    group = {"params": list(masks), "is_masked": True}
    if state == "offload":
        optimizer: SparseAdamW = OffloadedAdamW([group], half=torch.bfloat16, **options)
        optimizer.begin_offload(model)
    else:
        optimizer = SparseAdamW([group], moments=state, **options)
    optimizer.kernels = kernels
    optimizer.bind_masks(masks)
    return optimizer


def moment_bytes(optimizer: SparseAdamW) -> float:
    """Bytes of the moments, of one weight."""
    states = optimizer.state
    taken = sum(moments8bit.num_bytes(states[p][key]) for p in states for key in ("exp_avg", "exp_avg_sq"))
    return taken / sum(p.numel() for p in states)


def measure_states(settings: Settings, kernels: Kernels) -> Iterator[Result]:
    count, size = (1, 64) if settings.quick else (4, 2048)
    has_8bit = moments8bit.is_installed()
    states: tuple[State, ...] = ("float32", "8bit", "offload") if has_8bit else ("float32", "offload")
    optimizers = {state: build_state(state, kernels, count, size, settings.device) for state in states}
    times = interleave({name: each.step for name, each in optimizers.items()}, settings.pairs(10))
    about: dict[str, Any] = dict(question="optimizer step", against="float32 moments on the device")
    for name in states[1:]:
        case = f"{name} {count}x{size}², {kernels}"
        yield Result.of(times[name], times["float32"], case=case, **about)
    if not has_8bit:
        yield Result(case=f"8bit {count}x{size}², {kernels}", reason="torchao is not installed (extra 8bit)", **about)
        return
    taken = {name: moment_bytes(each) for name, each in optimizers.items()}
    yield Result.of([taken["8bit"]], [taken["float32"]], case="8bit, moments of a weight", unit="bytes", **about)


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
    yield from measure_states(settings, "eager" if fault or settings.quick else "compiled")


if __name__ == "__main__":
    main(measure)
