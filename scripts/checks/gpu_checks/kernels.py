"""Checks 2, 4, 5 and 6: masks, updates and masked products, right and fast."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ast_sparse import SparseAdamW, refresh_masks
from ast_sparse.kernels.choice import Kernels
from ast_sparse.kernels.nm_masks import magnitude_mask
from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masked_copy import MaskedWeights
from ast_sparse.sparsity.masks import Pattern, nm_mask
from ast_sparse.sparsity.model import masks_by_parameter, use_kernels, use_masked_weights
from scripts.checks.gpu_checks.bench import (
    Bench,
    Line,
    compared,
    compiled_for,
    counted,
    float32_sums,
    info,
    launched,
    right,
    waits_of,
    worst,
)

PLACEMENTS = ("momentum", "gradient", "weight")
KERNELS: tuple[Kernels, ...] = ("compiled", "eager")
OPTIONS: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
DECAY = 1e-2


# ---- 2: masks and updates ------------------------------------------------------------------------------------------


def masks_and_updates(bench: Bench) -> Iterator[Line]:
    """Masks have the bits of the CPU; updates agree with the formulas in float64."""
    with compiled_for(bench):
        yield from _masks(bench)
        yield from _updates(bench)


def _masks(bench: Bench) -> Iterator[Line]:
    rows, columns = bench.pick((1024, 2048), (8, 48))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    inputs = {"random": weight, "ties": (weight * 4).round() / 4}
    patterns = bench.pick(((1, 2), (2, 4), (4, 8)), ((2, 4),))
    for (n, m), dim, dtype in itertools.product(patterns, (1, 0), (torch.float32, torch.bfloat16)):
        differ = {}
        for name, kernels in itertools.product(inputs, KERNELS):
            here = inputs[name].to(dtype)
            expected = magnitude_mask(here, n, m, dim, "eager")
            found = magnitude_mask(here.to(bench.device), n, m, dim, kernels)
            differ[f"{name}, {kernels}"] = int((found.cpu() ^ expected).count_nonzero())
        case = f"mask {n}:{m} along {dim}, {dtype}"
        yield right(case, not any(differ.values()), "the bits of the CPU", positions_that_differ=differ)


def _updates(bench: Bench) -> Iterator[Line]:
    rows, columns = bench.pick((1024, 1024), (8, 16))
    generator = torch.Generator().manual_seed(2)
    start, *grads = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(4))
    mask = nm_mask(start.abs())
    for placement, kernels in itertools.product(PLACEMENTS, KERNELS):
        weight = nn.Parameter(start.float().to(bench.device))
        optimizer = SparseAdamW(
            [{"params": [weight], "is_masked": True}], mask_decay=DECAY, decay_placement=placement, **OPTIONS
        )
        optimizer.kernels = kernels
        optimizer.bind_masks({weight: mask.to(bench.device)})
        for grad in grads:
            weight.grad = grad.float().to(bench.device)
            optimizer.step()
        state = optimizer.state[weight]
        found = (weight.detach(), state["exp_avg"], state["exp_avg_sq"])
        expected = updated(placement, start.float().double(), mask, [grad.float().double() for grad in grads])
        errors = [worst(a.cpu(), b) for a, b in zip(found, expected, strict=True)]
        case = f"update of 3 steps, {placement}, {kernels}"
        yield right(case, max(errors) <= 1e-6, "error <= 1e-6", weight=errors[0], first=errors[1], second=errors[2])


def updated(placement: str, w: Tensor, mask: Tensor, grads: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments after some steps, by the formulas (16)-(23) of the paper, in float64."""
    lr, (beta1, beta2), eps, decay = OPTIONS["lr"], OPTIONS["betas"], OPTIONS["eps"], OPTIONS["weight_decay"]
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for step, grad in enumerate(grads, 1):
        pruned = DECAY * w * ~mask
        if placement == "gradient":
            grad = grad + pruned
        first = beta1 * first + (1 - beta1) * grad
        direction = first + pruned if placement == "momentum" else first
        squared = direction if placement == "momentum" else grad
        second = beta2 * second + (1 - beta2) * squared**2
        scaled = direction / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        w = w - lr * decay * w - lr * scaled - (lr * pruned if placement == "weight" else 0)
    return w, first, second


# ---- 4: refresh ----------------------------------------------------------------------------------------------------


def refresh(bench: Bench) -> Iterator[Line]:
    """A mask costs less than a copy of its weight, and a whole refresh waits for the GPU once."""
    rows, columns = bench.pick((4096, 11008), (8, 48))
    model = _matrices(4, rows, columns, bench.device)
    for layer in model:
        make_sparse(layer, nm_mask(torch.rand_like(layer.weight)), Pattern(2, 4))
    use_kernels(model, "compiled")
    weight = model[0].weight.detach()
    target = torch.empty_like(weight)
    with compiled_for(bench):
        sides: dict[str, Callable[[], Any]] = {
            "ours": partial(magnitude_mask, weight, 2, 4, 1, "compiled"),
            "with flip rates": lambda: refresh_masks(model),
            "copy_": lambda: target.copy_(weight),
        }
        times = bench.times(sides)
        times["with flip rates"] /= len(model)
        yield compared(bench, f"mask 2:4 of {rows}x{columns} float32", times, "copy_", 0.8)
        if not bench.is_dry:
            waits = waits_of(lambda: refresh_masks(model))
            yield counted(f"waits of a refresh of {len(model)} layers", len(waits), 1, of=waits)


def _matrices(count: int, rows: int, columns: int, device: torch.device) -> Any:
    return nn.Sequential(*(nn.Linear(columns, rows, bias=False, device=device) for _ in range(count)))


# ---- 5: update -----------------------------------------------------------------------------------------------------


def update(bench: Bench) -> Iterator[Line]:
    """A step of masked weights beside dense AdamW; kernels a parameter; no graph is compiled again."""
    count, size = bench.pick((12, 4096), (2, 16))
    with compiled_for(bench):
        dense = _step_of("adamw", count, size, bench.device)
        sides = {name: _step_of(name, count, size, bench.device) for name in bench.pick(PLACEMENTS, PLACEMENTS[:1])}
        for placement, optimizer in sides.items():
            optimizer.step()  # compiles
            times = bench.times({"ours": optimizer.step, "AdamW": dense.step})
            yield compared(bench, f"update of {count} x {size}x{size}, {placement}", times, "AdamW", 1.1)
            if not bench.is_dry:
                names = _kernels_of(optimizer.step)
                kinds = sorted(set(names))
                yield counted(f"kernels a parameter, {placement}", len(names) / count, 1, names=kinds)
            yield _graphs(bench, placement, optimizer, size // 2)


def _step_of(side: str, count: int, size: int, device: torch.device) -> Any:
    model = _matrices(count, size, size, device)
    for layer in model:
        layer.weight.grad = torch.randn_like(layer.weight)
    if side == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS)
    for layer in model:
        make_sparse(layer, nm_mask(layer.weight.detach().abs()), Pattern(2, 4))
    masks = masks_by_parameter(model)
    optimizer = SparseAdamW(
        [{"params": list(masks), "is_masked": True}], mask_decay=DECAY, decay_placement=side, **OPTIONS
    )
    optimizer.kernels = "compiled"
    optimizer.bind_masks(masks)
    return optimizer


def _kernels_of(call: Callable[[], Any]) -> list[str]:
    """The kernels that a call launches; copies from the host are none."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        call()
        torch.cuda.synchronize()
    return [event.name for event in launched(found.events())]


def _graphs(bench: Bench, placement: str, optimizer: Any, size: int) -> Line:
    """How many graphs a new λ, a new learning rate, later steps and another size compile."""
    from torch._dynamo.utils import counters

    other = _step_of(placement, 1, size, bench.device)
    before = counters["stats"]["unique_graphs"]
    for group in optimizer.param_groups:
        group["mask_decay"], group["lr"] = DECAY / 3, OPTIONS["lr"] / 3
    optimizer.step()
    other.step()
    found = counters["stats"]["unique_graphs"] - before
    return counted(f"graphs compiled again, {placement}", found, 0)


# ---- 6: masked linear ----------------------------------------------------------------------------------------------


def masked_linear(bench: Bench) -> Iterator[Line]:
    """Forward and backward pass of a micro-batch under bf16 autocast, beside `nn.Linear`."""
    tokens = bench.pick(4096, 8)
    for rows, columns in bench.pick(((4096, 4096), (11008, 4096), (4096, 11008)), ((16, 32),)):
        dense, kept, made = _matrices(3, rows, columns, bench.device)
        mask = nm_mask(dense.weight.detach().abs())
        choices: tuple[tuple[Any, MaskedWeights], ...] = ((kept, "kept"), (made, "made"))
        for layer, how in choices:
            with torch.no_grad():
                layer.weight.copy_(dense.weight)
            make_sparse(layer, mask, Pattern(2, 4))
            use_masked_weights(layer, how)
        with torch.no_grad():
            dense.weight.mul_(mask)
        x = bench.random(tokens, columns).requires_grad_()
        grad = bench.random(tokens, rows, dtype=torch.bfloat16)
        case = f"{rows}x{columns}, {tokens} tokens"
        for layer, how in choices:
            yield _same(f"{case}, values, {how}", layer, dense, x, grad)
        sides = {
            "ours": partial(micro_batch, kept, x, grad), "nn.Linear": partial(micro_batch, dense, x, grad),
            "first of a step": partial(micro_batch, kept, x, grad, is_new=True),
            "made": partial(micro_batch, made, x, grad),
        }  # fmt: skip
        times = bench.times(sides)
        ratios = {name: times[name] / max(times["nn.Linear"], 1e-9) for name in ("first of a step", "made")}
        yield compared(bench, f"{case}, time", times, "nn.Linear", 1.08, other_ratios=ratios)
        peaks = {}
        for name, call in sides.items():
            # the call frees old gradients, which would be subtracted from its peak
            x.grad = dense.weight.grad = kept.weight.grad = made.weight.grad = None
            peaks[name] = bench.peak(call)
        yield info(f"{case}, peak", bytes=peaks, kept_copy=kept.masked_copy.nbytes)


def micro_batch(layer: nn.Module, x: Tensor, grad: Tensor, is_new: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients; `is_new`: the weight has been changed before."""
    weight: Any = layer.weight
    weight.grad = x.grad = None
    if is_new:
        torch.autograd.graph.increment_version(weight)
    with torch.autocast(x.device.type, torch.bfloat16):
        out = layer(x)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), x.grad, weight.grad


def _same(case: str, sparse: nn.Module, dense: nn.Module, x: Tensor, grad: Tensor) -> Line:
    with float32_sums():
        pairs = list(zip(micro_batch(sparse, x, grad, True), micro_batch(dense, x, grad), strict=True))
    errors = [worst(a, b) for a, b in pairs]
    measured = dict(output=errors[0], by_input=errors[1], by_weight=errors[2])
    equal = all(torch.equal(a, b) for a, b in pairs)
    return right(case, max(errors) <= 2**-7, "error <= 2^-7 of nn.Linear's", equal=equal, **measured)
