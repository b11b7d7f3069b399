"""Random products with 2:4 weights, and which results of them are right: a slow twin in float64.

The result of a row and a token is Σ w·x + b over the kept columns. A level adds n = in/2 products in float32, in any
order, and rounds once. Each of the n + 1 sums has a relative error of at most ε/2 (ε = 2⁻²³), and so the sum before
rounding is within (n + 1)·ε·(Σ|w·x| + |b|) of the exact one, with a factor of two to spare. To this comes what is lost
below the smallest float32: 2⁻¹⁴⁹ for each sum. Two levels take subnormal numbers as 0 with bfloat16 (`flushes`):
products with one may be missing, and each sum below 2⁻¹²⁶ too. Rounding is monotone: a right result is between the two
ends of that interval, rounded.

Not finite: a sum that is inf or NaN must be that. If Σ|w·x| + |b| exceeds float32, a part of the sum may, so anything
is right. If x is not finite in a pruned column, NaN is right too (0·inf).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NIBBLES = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)
EPSILON, LARGEST, SMALLEST, SMALLEST_NORMAL = 2.0**-23, torch.finfo(torch.float32).max, 2.0**-149, 2.0**-126
KINDS = ("normal", "normal", "wide", "large", "small", "subnormal", "special")


@dataclass(frozen=True)
class Case:
    """x `[..., in]`, any strides; values `[out, in/2]`; meta `[out, in/8]`; bias `[out]` or None."""

    x: Tensor
    values: Tensor
    meta: Tensor
    bias: Tensor | None

    def __str__(self) -> str:
        shape, stride = tuple(self.x.shape), tuple(self.x.stride())
        bias = "no bias" if self.bias is None else "bias"
        return f"{self.x.dtype} x {shape} strides {stride}, {len(self.values)} rows, {bias}"


def random_case(seed: int, place: Callable[[Tensor], Tensor] = torch.clone) -> Case:
    """The case of this seed; each of its tensors is a view of all that `place` returns."""
    random = torch.Generator().manual_seed(seed)

    def below(end: int) -> int:
        return int(torch.randint(end, (), generator=random))

    dtype = DTYPES[below(3)]
    long = below(60)  # rarely, one of the three is so large that a level works in several pieces
    columns = 8 * (1 + below(320 if long == 0 else 12 if below(3) else 80))
    rows = 1 + below(300 if long == 1 else 12 if below(3) else 70)
    tokens = 1 + below(700 if long == 2 else 16 if below(8) else 24 if below(4) else 150)
    values = place(_numbers((rows, columns // 2), dtype, random))
    both = NIBBLES[torch.randint(6, (rows, columns // 8, 2), generator=random)]
    meta = place(both[..., 0] | both[..., 1] << 4)
    bias = place(_numbers((rows,), dtype, random)) if below(2) else None
    layout = below(4)
    if layout == 0:  # rows with a gap, and an odd start
        x = place(_numbers((tokens, columns + 3), dtype, random))[:, 3:]
    elif layout == 1:  # columns first
        x = place(_numbers((columns, tokens), dtype, random)).t()
    else:
        x = place(_numbers((tokens, columns), dtype, random))
    if layout == 2 and tokens % 2 == 0:
        x = x.unflatten(0, (2, -1))
    return Case(x, values, meta, bias)


def flushes(level: str, dtype: torch.dtype) -> bool:
    """Whether subnormal numbers may be taken as 0."""
    return level in ("amx_bf16", "avx512_bf16") and dtype == torch.bfloat16


def wrong_entries(y: Tensor, case: Case, level: str) -> int:
    """How many entries of the result are not right.

    Args:
        y: `[..., out]`, the dtype of x.
        level: that computed it.
    """
    assert y.dtype == case.x.dtype and y.shape == (*case.x.shape[:-1], len(case.values))
    x, y = case.x.reshape(-1, case.x.shape[-1]).double(), y.reshape(-1, y.shape[-1])
    read, weights = x[:, _columns(case.meta)], case.values.double()  # [tokens, out, in/2]
    products, bias = read * weights, torch.zeros(len(weights)).double() if case.bias is None else case.bias.double()
    exact, size = products.sum(-1) + bias, products.abs().sum(-1) + bias.abs()
    count = products.shape[-1] + 1
    bound = count * (EPSILON * size + SMALLEST)
    either = ~x.isfinite().all(-1, keepdim=True).expand_as(exact)
    if flushes(level, y.dtype):
        dropped = ((weights.abs() < SMALLEST_NORMAL) | (read.abs() < SMALLEST_NORMAL)) & (products != 0)
        bound += torch.where(dropped, products.abs(), 0).nan_to_num().sum(-1) + 2 * count * SMALLEST_NORMAL
        either |= (dropped & ~products.isfinite()).any(-1)
    finite = torch.where(products.isfinite(), products.abs(), 0).sum(-1) + torch.where(bias.isfinite(), bias.abs(), 0)
    low, high = ((exact + sign * bound).float().to(y.dtype) for sign in (-1, 1))
    ends = exact.isinf()
    low, high = (torch.where(ends, exact.float().to(y.dtype), end) for end in (low, high))
    right = torch.where(exact.isnan(), y.isnan(), (low <= y) & (y <= high))
    right |= y.isnan() & either
    right |= finite * (1 + count * EPSILON) > LARGEST
    return int((~right).sum())


def slow_dense(values: Tensor, meta: Tensor) -> Tensor:
    """W `[out, in]` entry by entry of a group, with the bits of the values."""
    bits = {2: torch.int16, 4: torch.int32}[values.element_size()]
    dense = torch.zeros(len(values), 2 * values.shape[1], dtype=bits)
    dense.scatter_(1, _columns(meta), values.view(bits))
    return dense.view(values.dtype)


def _columns(meta: Tensor) -> Tensor:
    """Which column each kept value meets: `[out, in/2]`."""
    nibbles = torch.stack((meta % 16, meta // 16), -1).flatten(1).long()
    groups = 4 * torch.arange(nibbles.shape[1])
    return torch.stack((groups + nibbles % 4, groups + nibbles // 4), -1).flatten(1)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    kind = KINDS[int(torch.randint(len(KINDS), (), generator=random))]
    found, limits = torch.randn(shape, generator=random, dtype=torch.float64), torch.finfo(dtype)
    if kind == "wide":
        found *= torch.exp2(torch.randint(-40, 40, shape, generator=random).double())
    elif kind == "large":
        found *= limits.max / 4
    elif kind == "small":
        found *= limits.tiny * 8
    elif kind == "subnormal":
        found *= limits.tiny / 2
    numbers = found.clamp(limits.min, limits.max).to(dtype)
    if kind == "special":
        special = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, limits.tiny / 4, 1.0], dtype=dtype)
        if int(torch.randint(2, (), generator=random)):
            special = torch.cat((special, torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)))
        chosen = special[torch.randint(len(special), shape, generator=random)]
        share = 0.5 ** int(torch.randint(1, 10, (), generator=random))
        numbers = torch.where(torch.rand(shape, generator=random) < share, chosen, numbers)
    return numbers
