"""Check 11: the products with compressed 2:4 weights are right, and how fast they are beside cuBLAS.

Needs torch and triton only. Results are compared with float64, decoded weights with the bits of the CPU.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.kernels.code24 import pack24, unpack24
from ast_sparse.kernels.nm_masks import nm_group_mask
from scripts.checks.gpu_checks.bench import Bench, Line, cost, float32_sums, info, right

LAYERS = ((4096, 4096), (11008, 4096), (4096, 11008))
GOALS = {1: 0.65, 8: 0.77}  # of cuBLAS' time, at this many tokens; 0.56 is the share of the bytes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_Part = tuple[str, Callable[[], Iterator[Line]]]


def linear24(bench: Bench) -> Iterator[Line]:
    """Every part; one that fails does not stop the others, and one for which time runs out is left."""
    for name, part in parts(bench):
        lines = part()
        try:
            while time.monotonic() < bench.deadline:
                line = next(lines, None)
                if line is None:
                    break
                yield {**line, "case": f"{name}: {line['case']}"}
            else:
                yield {"case": name, "verdict": "skipped", "reason": "out of time"}
        except Exception as error:
            yield {"case": name, "verdict": "failed", "reason": f"{type(error).__name__}: {error}"[:1000]}


def parts(bench: Bench) -> list[_Part]:
    """In the order of what matters most, for a machine on which time runs out."""
    return [
        ("decoding", partial(decoding, bench)),
        ("decode speed, 1 token", partial(decode_speed, bench, 1)),
        ("decode speed, 8 tokens", partial(decode_speed, bench, 8)),
        ("decode speed, 16 tokens", partial(decode_speed, bench, 16)),
        ("prefill speed, 4096 tokens", partial(prefill_speed, bench, 4096)),
        ("many tokens", partial(many_tokens, bench)),
        ("slorb", partial(slorb, bench)),
        ("graphs", partial(graphs, bench)),
        *((f"prefill speed, {tokens} tokens", partial(prefill_speed, bench, tokens)) for tokens in (64, 512)),
        *((f"decode speed, {tokens} tokens", partial(decode_speed, bench, tokens)) for tokens in (2, 4)),
        ("products", partial(products, bench)),  # a minute or more: a kernel is compiled for almost every case
    ]


def layers_of(bench: Bench) -> tuple[tuple[int, int], ...]:
    return bench.pick(LAYERS, ((16, 64),))


def ragged(bench: Bench) -> tuple[tuple[int, int], ...]:
    return bench.pick(((1000, 1032), (33, 8), (4096, 4096)), ((9, 24),))


def weight_of(bench: Bench, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values, metadata and the dense weight."""
    mask = nm_group_mask(torch.rand(rows, columns, device=bench.device), 2, 4)
    values, meta = pack24((bench.random(rows, columns) / columns**0.5).to(dtype), mask)
    return values, meta, unpack24(values, meta)


def compared(case: str, found: Tensor, expected: Tensor, terms: int, roundings: float = 1.0, same: bool = True) -> Line:
    """The largest error over what rounding allows: of the result, and of a float32 sum of that many terms."""
    eps, eps32 = torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps
    allowed = roundings * eps * expected.abs() + 4 * eps32 * terms**0.5 * expected.abs().max() + 1e-30
    worst = float(((found.double() - expected).abs() / allowed).max())
    return right(case, worst <= 1 and same, "<= 1 of what rounding allows, the same twice", worst=worst, same=same)


def products(bench: Bench) -> Iterator[Line]:
    """Every plan of every number of tokens, with and without bias."""
    from ast_sparse.kernels.gpu import dispatch, plans

    for rows, columns in ragged(bench):
        for dtype in DTYPES:
            values, meta, dense = weight_of(bench, rows, columns, dtype)
            for tokens in (1, 8) if bench.is_dry else (1, 2, 3, 8, 40):
                x, bias = bench.random(tokens, columns, dtype=dtype), bench.random(rows, dtype=dtype)
                expected = x.double() @ dense.double().t()
                processors = dispatch._processors(bench.device)
                for plan in plans.plans(tokens, rows, columns, dtype, processors)[: None if dtype != DTYPES[1] else 1]:
                    found = plans.product(x, values, meta, bias, plan)
                    again = plans.product(x, values, meta, bias, plan)
                    case, same = f"{rows}x{columns} {dtype} {tokens} tokens, {plan}", torch.equal(found, again)
                    yield compared(case, found, expected + bias.double(), columns, same=same)


def decoding(bench: Bench) -> Iterator[Line]:
    """Decoded weights have the bits that `unpack24` gives on the CPU."""
    from ast_sparse.kernels.gpu import prefill

    for rows, columns in ragged(bench):
        for dtype in DTYPES:
            values, meta, dense = weight_of(bench, rows, columns, dtype)
            expected = unpack24(values.cpu(), meta.cpu())
            same = [torch.equal(found.cpu(), expected) for found in (prefill.decode(values, meta), dense)]
            yield right(f"{rows}x{columns} {dtype}", all(same), "the bits of the CPU", kernel=same[0], unpack24=same[1])


def many_tokens(bench: Bench) -> Iterator[Line]:
    """The ways of a prefill; 77 tokens are not a multiple of 8."""
    from ast_sparse.kernels.gpu import prefill

    rows, columns = layers_of(bench)[0]
    for dtype in DTYPES[:2]:
        values, meta, dense = weight_of(bench, rows, columns, dtype)
        x, bias = bench.random(77, columns, dtype=dtype), bench.random(rows, dtype=dtype)
        for name, each in itertools.product(ways_of_prefill(bench, rows, columns, dtype), (bias, None)):
            expected = x.double() @ dense.double().t() + (0 if each is None else each.double())
            case = f"{name} {rows}x{columns} {dtype}{'' if each is None else ' bias'}"
            try:
                with float32_sums():
                    found = getattr(prefill, name)(x, values, meta, each)
            except Exception as error:  # not on this GPU: dispatch leaves it out
                yield info(case, absent=f"{type(error).__name__}: {error}"[:300])
                continue
            yield compared(case, found, expected, columns, 2.0)


def ways_of_prefill(bench: Bench, rows: int, columns: int, dtype: torch.dtype) -> list[str]:
    """Decoding first, and PyTorch's semi-structured products where it has them."""
    from ast_sparse.kernels.gpu import prefill

    return ["decoded"] + ([] if bench.is_dry else prefill.semi_structured(rows, columns, dtype, bench.device))


def slorb(bench: Bench) -> Iterator[Line]:
    """SLoRB in the pass that adds the parts."""
    from ast_sparse.kernels.gpu import dispatch

    rows, columns = layers_of(bench)[0]
    for tokens in (1, 8):
        values, meta, dense = weight_of(bench, rows, columns, torch.bfloat16)
        s = bench.random(rows, columns // 16, dtype=torch.bfloat16)
        projection = bench.random(columns // 16, columns, dtype=torch.bfloat16) / columns**0.5
        x = bench.random(tokens, columns, dtype=torch.bfloat16)
        expected = x.double() @ dense.double().t() + F.linear(x, projection).double() @ s.double().t()
        found = dispatch.linear(x, values, meta, None, (s, projection))
        yield compared(f"{rows}x{columns}, {tokens} tokens", found, expected, columns)


def graphs(bench: Bench) -> Iterator[Line]:
    """A captured CUDA graph, replayed with other inputs, gives what the same calls give."""
    from ast_sparse.kernels.linear24 import linear24

    rows, columns = layers_of(bench)[0]
    values, meta, _ = weight_of(bench, rows, columns, torch.bfloat16)
    for tokens in (1, 8, 100):
        x, other = (bench.random(tokens, columns, dtype=torch.bfloat16) for _ in range(2))
        with torch.no_grad():
            linear24(x, values, meta)  # measures, before a graph is captured
            if bench.is_dry:
                fits = linear24(other, values, meta).shape == (tokens, rows)
                yield right(f"{tokens} tokens, without a graph", fits, "an output [tokens, rows]")
                continue
            graph = torch.cuda.CUDAGraph()
            with float32_sums(), torch.cuda.graph(graph):
                out = linear24(x, values, meta)
            x.copy_(other)
            graph.replay()
            expected = other.double() @ unpack24(values, meta).double().t()
            yield compared(f"{tokens} tokens", out, expected, columns, 2.0)


def decode_speed(bench: Bench, tokens: int) -> Iterator[Line]:
    """Every plan, and the semi-structured products, beside `F.linear` of the dense weight."""
    from ast_sparse.kernels.gpu import dispatch, plans

    for rows, columns in layers_of(bench):
        values, meta, dense = weight_of(bench, rows, columns, torch.bfloat16)
        x = bench.random(tokens, columns, dtype=torch.bfloat16)
        sides: dict[str, Callable[[], Any]] = {"dense": partial(F.linear, x, dense)}
        for plan in plans.plans(tokens, rows, columns, x.dtype, dispatch._processors(bench.device)):
            sides[str(plan)] = partial(plans.product, x, values, meta, None, plan)
        others = _ways(bench, x, values, meta)
        times = bench.times({**sides, **others})
        yield _speed(bench, f"{rows}x{columns}", times, list(others), GOALS.get(tokens))


def prefill_speed(bench: Bench, tokens: int) -> Iterator[Line]:
    """Every way of a prefill beside `F.linear` of the dense weight."""
    for rows, columns in layers_of(bench):
        values, meta, dense = weight_of(bench, rows, columns, torch.bfloat16)
        x = bench.random(tokens, columns, dtype=torch.bfloat16)
        times = bench.times({"dense": partial(F.linear, x, dense), **_ways(bench, x, values, meta)})
        yield _speed(bench, f"{rows}x{columns}", times, [], None)


def _ways(bench: Bench, x: Tensor, values: Tensor, meta: Tensor) -> dict[str, Callable[[], Any]]:
    """The ways of a prefill that work here."""
    from ast_sparse.kernels.gpu import prefill

    found: dict[str, Callable[[], Any]] = {}
    for name in ways_of_prefill(bench, values.shape[0], x.shape[1], x.dtype):
        way = partial(getattr(prefill, name), x, values, meta, None)
        try:
            way()
        except Exception:  # `many_tokens` says why
            continue
        found[name] = way
    return found


def _speed(bench: Bench, case: str, times: dict[str, float], others: list[str], goal: float | None) -> Line:
    """The fastest of our ways over the dense product; `others` are only shown."""
    ours = {name: each for name, each in times.items() if name != "dense" and name not in others}
    best = min(ours, key=lambda name: ours[name])
    ratio = ours[best] / max(times["dense"], 1e-9)
    if goal is None:
        return info(case, ratio=ratio, best=best, milliseconds=times)
    return cost(bench, case, ratio, goal, best=best, milliseconds=times)
