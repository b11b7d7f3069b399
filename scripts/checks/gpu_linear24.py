"""Are the 2:4 kernels right on this GPU, and how fast are they beside cuBLAS? Less than two minutes on an H100.

    python scripts/checks/gpu_linear24.py [--seconds 110] [--dry]

Needs torch for CUDA and triton only, no network and no data; where ast_sparse is not installed, start it in the
checkout with `PYTHONPATH=.`. Each line of the output is JSON, printed as soon as it is known. Results are compared with
float64. Times: CUDA events, 5 warm-ups, 20 interleaved pairs, an emptied L2 cache before each call, medians. A check
that fails does not stop the others; after `--seconds` the remaining ones are named and skipped. The exit code is 1 if a
result was wrong or a check failed.

`--dry` runs everything on tiny shapes in Triton's interpreter, without a GPU; its times mean nothing.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.kernels.code24 import pack24, unpack24
from ast_sparse.kernels.nm_masks import nm_group_mask

WARMUPS, PAIRS = 5, 20
LAYERS = ((4096, 4096), (11008, 4096), (4096, 11008))
GOALS = {1: 1.5, 8: 1.3}  # times faster than cuBLAS, at this many tokens
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_Check = tuple[str, Callable[[], Iterator[dict[str, Any]]]]


class Bench:
    """The machine, and shapes that suit it."""

    def __init__(self, is_dry: bool) -> None:
        self.is_dry = is_dry
        self.device = torch.device("cpu" if is_dry else "cuda:0")
        self.layers = ((16, 64),) if is_dry else LAYERS
        self.ragged = ((9, 24),) if is_dry else ((1000, 1032), (33, 8), (4096, 4096))
        self.pairs = 1 if is_dry else PAIRS
        # larger than the L2 cache; writing it also keeps the GPU busy for longer than two kernels take to launch
        self.cache = torch.empty(1 if is_dry else 1 << 30, dtype=torch.uint8, device=self.device)

    def weight(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Values, metadata and the dense weight."""
        mask = nm_group_mask(torch.rand(rows, columns, device=self.device), 2, 4)
        values, meta = pack24((torch.randn(rows, columns, device=self.device) / columns**0.5).to(dtype), mask)
        return values, meta, unpack24(values, meta)

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def times(self, sides: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median milliseconds of each side; they take turns."""
        found: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range((0 if self.is_dry else WARMUPS) + self.pairs):
            for name, call in sides.items():
                elapsed = self._milliseconds(call)
                if self.is_dry or round_ >= WARMUPS:
                    found[name].append(elapsed)
        return {name: statistics.median(all_) for name, all_ in found.items()}

    def _milliseconds(self, call: Callable[[], Any]) -> float:
        self.cache.zero_()
        if self.is_dry:
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def compared(found: Tensor, expected: Tensor, terms: int, roundings: float = 1.0) -> dict[str, Any]:
    """The largest error over what rounding allows: of the result, and of a float32 sum of that many terms."""
    eps, eps32 = torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps
    allowed = roundings * eps * expected.abs() + 4 * eps32 * terms**0.5 * expected.abs().max() + 1e-30
    worst = float(((found.double() - expected).abs() / allowed).max())
    return {"worst": round(worst, 4), "right": worst <= 1}


def products(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every plan of every number of tokens, with and without bias."""
    from ast_sparse.kernels.gpu import dispatch, plans

    for rows, columns in bench.ragged:
        for dtype in DTYPES:
            values, meta, dense = bench.weight(rows, columns, dtype)
            for tokens in (1, 8) if bench.is_dry else (1, 2, 3, 8, 40):
                x, bias = bench.random(tokens, columns, dtype=dtype), bench.random(rows, dtype=dtype)
                expected = x.double() @ dense.double().t()
                processors = dispatch._processors(bench.device)
                for plan in plans.plans(tokens, rows, columns, dtype, processors)[: None if dtype != DTYPES[1] else 1]:
                    found = plans.product(x, values, meta, bias, plan)
                    again = plans.product(x, values, meta, bias, plan)
                    line = compared(found, expected + bias.double(), columns)
                    line["right"] &= torch.equal(found, again)
                    yield {"case": f"{rows}x{columns} {dtype} {tokens} tokens, {plan}", **line}


def decoding(bench: Bench) -> Iterator[dict[str, Any]]:
    """Decoded weights have the bits of `unpack24`."""
    from ast_sparse.kernels.gpu import prefill

    for rows, columns in bench.ragged:
        for dtype in DTYPES:
            values, meta, dense = bench.weight(rows, columns, dtype)
            yield {"case": f"{rows}x{columns} {dtype}", "right": torch.equal(prefill.decode(values, meta), dense)}


@contextmanager
def float32_sums() -> Iterator[None]:
    """cuBLAS may otherwise add shares of a sum in 16 bits, and the decoded way would seem wrong."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


def many_tokens(bench: Bench) -> Iterator[dict[str, Any]]:
    """The ways of a prefill; 77 tokens are not a multiple of 8."""
    from ast_sparse.kernels.gpu import prefill

    rows, columns = bench.layers[0]
    for dtype in DTYPES[:2]:
        values, meta, dense = bench.weight(rows, columns, dtype)
        x, bias = bench.random(77, columns, dtype=dtype), bench.random(rows, dtype=dtype)
        for name, each in itertools.product(ways_of_prefill(bench, rows, columns, dtype), (bias, None)):
            expected = x.double() @ dense.double().t() + (0 if each is None else each.double())
            try:
                with float32_sums():
                    found = getattr(prefill, name)(x, values, meta, each)
                line = compared(found, expected, columns, 2.0)
            except Exception as error:  # not on this GPU: dispatch leaves it out
                line = {"absent": f"{type(error).__name__}: {error}"[:300]}
            yield {"case": f"{name} {rows}x{columns} {dtype}{'' if each is None else ' bias'}", **line}


def ways_of_prefill(bench: Bench, rows: int, columns: int, dtype: torch.dtype) -> list[str]:
    from ast_sparse.kernels.gpu import prefill

    return ["decoded"] + ([] if bench.is_dry else prefill.semi_structured(rows, columns, dtype, bench.device))


def slorb(bench: Bench) -> Iterator[dict[str, Any]]:
    """SLoRB in the pass that adds the parts."""
    from ast_sparse.kernels.gpu import dispatch

    rows, columns = bench.layers[0]
    for tokens in (1, 8):
        values, meta, dense = bench.weight(rows, columns, torch.bfloat16)
        s = bench.random(rows, columns // 16, dtype=torch.bfloat16)
        projection = bench.random(columns // 16, columns, dtype=torch.bfloat16) / columns**0.5
        x = bench.random(tokens, columns, dtype=torch.bfloat16)
        expected = x.double() @ dense.double().t() + F.linear(x, projection).double() @ s.double().t()
        found = dispatch.linear(x, values, meta, None, (s, projection))
        yield {"case": f"{rows}x{columns}, {tokens} tokens", **compared(found, expected, columns)}


def graphs(bench: Bench) -> Iterator[dict[str, Any]]:
    """A captured CUDA graph, replayed with other inputs, gives what the same calls give."""
    from ast_sparse.kernels.linear24 import linear24

    rows, columns = bench.layers[0]
    values, meta, _ = bench.weight(rows, columns, torch.bfloat16)
    for tokens in (1, 8, 100):
        x, other = (bench.random(tokens, columns, dtype=torch.bfloat16) for _ in range(2))
        with torch.no_grad():
            linear24(x, values, meta)  # measures, before a graph is captured
            if bench.is_dry:
                yield {"case": f"{tokens} tokens", "right": linear24(other, values, meta).shape == (tokens, rows)}
                continue
            graph = torch.cuda.CUDAGraph()
            with float32_sums(), torch.cuda.graph(graph):
                out = linear24(x, values, meta)
            x.copy_(other)
            graph.replay()
            expected = other.double() @ unpack24(values, meta).double().t()
            yield {"case": f"{tokens} tokens", **compared(out, expected, columns, 2.0)}


def decode_speed(bench: Bench, tokens: int) -> Iterator[dict[str, Any]]:
    """Every plan beside `F.linear` of the dense weight."""
    from ast_sparse.kernels.gpu import dispatch, plans

    for rows, columns in bench.layers:
        values, meta, dense = bench.weight(rows, columns, torch.bfloat16)
        x = bench.random(tokens, columns, dtype=torch.bfloat16)
        sides: dict[str, Callable[[], Any]] = {"dense": partial(F.linear, x, dense)}
        for plan in plans.plans(tokens, rows, columns, x.dtype, dispatch._processors(bench.device)):
            sides[str(plan)] = partial(plans.product, x, values, meta, None, plan)
        yield _speed(f"{rows}x{columns}, {tokens} tokens", bench.times(sides), GOALS.get(tokens))


def prefill_speed(bench: Bench, tokens: int) -> Iterator[dict[str, Any]]:
    """Every way of a prefill beside `F.linear` of the dense weight."""
    from ast_sparse.kernels.gpu import prefill

    for rows, columns in bench.layers:
        values, meta, dense = bench.weight(rows, columns, torch.bfloat16)
        x = bench.random(tokens, columns, dtype=torch.bfloat16)
        sides: dict[str, Callable[[], Any]] = {"dense": partial(F.linear, x, dense)}
        for name in ways_of_prefill(bench, rows, columns, x.dtype):
            way = partial(getattr(prefill, name), x, values, meta, None)
            try:
                way()
            except Exception:  # `many_tokens` says why
                continue
            sides[name] = way
        yield _speed(f"{rows}x{columns}, {tokens} tokens", bench.times(sides), None)


def _speed(case: str, times: dict[str, float], goal: float | None) -> dict[str, Any]:
    ours = {name: ms for name, ms in times.items() if name != "dense"}
    best = min(ours, key=lambda name: ours[name])
    ratio = times["dense"] / ours[best]
    line: dict[str, Any] = {"case": case, "milliseconds": {name: round(ms, 5) for name, ms in times.items()}}
    line |= {"best": best, "times_faster": round(ratio, 3)}
    return line if goal is None else line | {"goal": goal, "met": ratio >= goal}


def checks(bench: Bench) -> list[_Check]:
    """In the order of what matters most, for a machine on which time runs out."""
    return [
        ("decoding", partial(decoding, bench)),
        ("decode speed, 1 token", partial(decode_speed, bench, 1)),
        ("decode speed, 8 tokens", partial(decode_speed, bench, 8)),
        ("products", partial(products, bench)),
        ("many tokens", partial(many_tokens, bench)),
        ("slorb", partial(slorb, bench)),
        ("graphs", partial(graphs, bench)),
        *((f"prefill speed, {tokens} tokens", partial(prefill_speed, bench, tokens)) for tokens in (64, 512, 4096)),
        *((f"decode speed, {tokens} tokens", partial(decode_speed, bench, tokens)) for tokens in (2, 4, 16)),
    ]


def about() -> dict[str, Any]:
    import triton

    try:
        from scripts.provenance import provenance

        found = provenance()
    except ImportError:  # without transformers, or outside the checkout
        found = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    return {**found, "torch": torch.__version__, "triton": triton.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=110.0, help="No check begins, and no line follows, after this."
    )
    parser.add_argument("--dry", action="store_true", help="Tiny shapes in Triton's interpreter, without a GPU.")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        parser.error("There is no GPU here. --dry runs the same without one.")
    print(json.dumps({"about": about()}), flush=True)
    torch.manual_seed(0)
    bench, all_right = Bench(options.dry), True
    for name, check in checks(bench):
        started = time.monotonic()
        try:
            if started > deadline:
                raise TimeoutError
            for line in check():
                all_right &= line.get("right", True)
                print(json.dumps({"check": name, **line}), flush=True)
                if time.monotonic() > deadline:
                    raise TimeoutError
            print(json.dumps({"check": name, "seconds": round(time.monotonic() - started, 2)}), flush=True)
        except TimeoutError:
            print(json.dumps({"check": name, "skipped": "out of time"}), flush=True)
        except Exception as error:
            all_right = False
            print(json.dumps({"check": name, "failed": f"{type(error).__name__}: {error}"[:1000]}), flush=True)
    print(json.dumps({"all_right": all_right}), flush=True)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
