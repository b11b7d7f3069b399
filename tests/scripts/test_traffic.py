"""scripts/counts: bytes and kernels beside values computed by hand, and the table of scripts/benchmarks/traffic.py."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ast_sparse.errors import UserError
from scripts.benchmarks import traffic as benchmark
from scripts.benchmarks.harness import Settings
from scripts.counts.inductor import called, compiled_total, launches, planned
from scripts.counts.operations import Total, Traffic
from tests.processes import run_interpreted

A, B = torch.randn(8, 16), torch.randn(8, 16)  # 128 entries, 512 bytes
ROW, INDEX = torch.randn(16), torch.tensor([1, 5, 2])
OUT, HALF = torch.empty(8, 16), torch.randn(8, 16, dtype=torch.bfloat16)
MASK = torch.rand(8, 16) > 0.5


def zero_rows(x: torch.Tensor) -> None:
    x[:0].copy_(x[8:])


CASES: dict[str, tuple[Callable[[], Any], Total]] = {
    "elementwise": (lambda: A + B, Total(1, 1024, 512)),
    "the same tensor twice": (lambda: A * A, Total(1, 512, 512)),
    "in place": (lambda: OUT.add_(B), Total(1, 1024, 512)),
    "out=": (lambda: torch.add(A, B, out=OUT), Total(1, 1024, 512)),
    "overwritten": (lambda: OUT.copy_(HALF), Total(1, 256, 512)),
    "filled": (lambda: OUT.zero_(), Total(1, 0, 512)),
    "like another, which is not read": (lambda: torch.zeros_like(A), Total(1, 0, 512)),
    "broadcast": (lambda: A + ROW, Total(1, 576, 512)),
    "expanded": (lambda: A + ROW.expand(8, 16), Total(1, 576, 512)),
    "part of a tensor": (lambda: A[:2] + B[2:4], Total(1, 256, 128)),
    "cast": (lambda: A.to(torch.bfloat16), Total(1, 512, 256)),
    "cast to its own dtype": (lambda: A.to(torch.float32), Total(0, 0, 0)),
    "views and allocations": (lambda: (A.t()[3:], A.view(128), torch.empty(9), A.expand(2, 8, 16)), Total(0, 0, 0)),
    "nothing to copy": (lambda: zero_rows(OUT), Total(0, 0, 0)),
    "reduction": (lambda: A.sum(-1), Total(1, 512, 32)),
    "joined": (lambda: torch.cat([A, B]), Total(1, 1024, 1024)),
    "mask": (lambda: torch.where(MASK, A, B), Total(1, 128 + 1024, 512)),
    # the number becomes a tensor on the GPU, by a kernel of its own
    "mask with a number": (lambda: torch.where(MASK, A, 0), Total(2, 128 + 512 + 4, 4 + 512)),
    "rows by index": (lambda: A[INDEX], Total(1, 3 * 64 + 24, 3 * 64)),
    "one entry a row": (lambda: A.gather(1, torch.zeros(8, 1, dtype=torch.int64)), Total(2, 32 + 64, 64 + 32)),
    "embedding": (lambda: F.embedding(INDEX, A), Total(1, 3 * 64 + 24, 3 * 64)),
    "put at an index": (lambda: OUT.index_put_((INDEX,), B[:3]), Total(1, 24 + 3 * 64, 3 * 64)),
    "added at an index": (lambda: OUT.index_add_(0, INDEX, B[:3]), Total(1, 24 + 2 * 3 * 64, 3 * 64)),
    "added on a copy": (lambda: A.index_add(0, INDEX, B[:3]), Total(2, 512 + 24 + 2 * 3 * 64, 512 + 3 * 64)),
    "product": (lambda: A @ B.t(), Total(1, 1024, 256)),
    "product with an addend": (lambda: OUT[:, :8].addmm_(A, B.t()), Total(1, 1024 + 256, 256)),
    # largest, |.|, = inf, fill, difference, exp, sum, log, sum with the largest: rows of 32 bytes, a mask of 8
    "logsumexp": (
        lambda: A.logsumexp(-1),
        Total(9, 512 + 32 + 32 + 40 + 544 + 512 + 512 + 32 + 64, 32 + 32 + 8 + 32 + 512 + 512 + 32 + 32 + 32),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operations_cost_what_is_computed_by_hand(name: str) -> None:
    call, expected = CASES[name]
    with Traffic() as traffic:
        call()
    assert traffic.total() == expected


def test_a_layer_under_autocast_costs_what_is_computed_by_hand() -> None:
    layer, x = torch.nn.Linear(16, 8, bias=False), torch.randn(4, 16, requires_grad=True)
    (w, a, b), totals = (128, 64, 32), []  # entries of weight, input, output
    for _ in range(2):
        with Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
            y.backward(y.detach())
        totals.append(traffic)
    first, second = totals
    casts = Total(4, 4 * w + 4 * a + 2 * w + 2 * a, 2 * w + 2 * a + 4 * w + 4 * a)  # and those of both gradients
    products = Total(3, 2 * (w + a) + 2 * (b + w) + 2 * (b + a), 2 * (b + a + w))
    assert first.total(lambda name: name == "_to_copy") == second.total(lambda name: name == "_to_copy") == casts
    assert first.total(lambda name: name == "mm") == second.total(lambda name: name == "mm") == products
    assert first.total().kernels == 7  # the first gradients are kept as they are
    assert second.total(lambda name: name == "add_") == Total(2, 8 * w + 8 * a, 4 * w + 4 * a)
    assert second.total().kernels == 9


def test_a_gradient_of_rows_fills_all_rows() -> None:
    table, index = torch.randn(8, 16, requires_grad=True), torch.tensor([1, 1, 2])
    rows = F.embedding(index, table)
    with Traffic() as traffic:
        rows.backward(torch.ones(()).expand_as(rows))
    assert traffic.total(lambda name: name == "embedding_dense_backward") == Total(2, 4 + 24, 512 + 4)


INTERPRETED = """
import torch, triton, triton.language as tl
from scripts.counts.interpreter import counted_kernels
from scripts.counts.operations import Traffic

@triton.jit
def scaled(x, factor, out, count, width, SIZE: tl.constexpr):
    at = tl.program_id(0) * width + tl.arange(0, SIZE)
    inside = tl.arange(0, SIZE) < width
    loaded = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + at, loaded, mask=inside)
    tl.atomic_add(count + tl.zeros_like(at), 1, mask=inside)

x, out, count = torch.ones(3, 13, dtype=torch.bfloat16), torch.empty(3, 13), torch.zeros(1, dtype=torch.int32)
traffic = Traffic()
with counted_kernels(traffic):
    scaled[(3,)](x, torch.full((1,), 2.0), out, count, 13, SIZE=16)
    assert not traffic.kernels
    with traffic:
        scaled[(3,)](x, torch.full((1,), 2.0), out, count, 13, SIZE=16)
scaled[(3,)](x, torch.full((1,), 2.0), out, count, 13, SIZE=16)
assert bool((out == 2).all()) and count.item() == 3 * 39, (out, count)
print(traffic.triton, traffic.kernels["scaled"], traffic.read["scaled"], traffic.written["scaled"])
"""


def test_kernels_in_the_interpreter_count_what_their_masks_let_through() -> None:
    launches, kernels, read, written = map(int, run_interpreted(INTERPRETED).stdout.split())
    assert launches == kernels == 1
    assert read == 3 * (13 * 2 + 4 + 4) and written == 3 * (13 * 4 + 4)  # three rows; one address of `count`


def test_the_inductor_counts_each_operand_of_a_kernel_once() -> None:
    x = torch.ones(64, 100)

    def normalised(x: torch.Tensor) -> None:
        x.copy_(x - x.amax(-1, keepdim=True))

    assert compiled_total(normalised, x) == Total(1, 64 * 100 * 4 * 2, 0)
    assert bool((x == 1).all())


def test_the_inductor_masks_a_weight_in_one_kernel_and_leaves_products_to_pytorch() -> None:
    def layer(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = torch.where(mask, weight, 0).to(torch.bfloat16)
        return (x @ kept.t()).float()

    x = torch.ones(32, 64, dtype=torch.bfloat16)
    weight, mask = torch.ones(48, 64, requires_grad=True), torch.ones(48, 64, dtype=torch.bool)
    with planned(launches) as (backend, found):
        y = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)(x, weight, mask)
        y.backward(torch.ones_like(y))
    # backward: cast of the gradient, product, cast and mask
    assert found == [Counter({"Triton": 2, "mm": 1}), Counter({"Triton": 2, "mm": 1})]
    assert weight.grad is not None and weight.grad.shape == weight.shape


def test_whatever_written_code_calls_counts_unless_it_is_known_to_be_free() -> None:
    lines = [
        "import torch",
        "kernel = async_compile.triton('kernel', 'a.run()')",
        "def call(self, args):",
        "    buf0 = empty_strided_cuda((4, 4), (4, 1), torch.float32)",
        "    kernel.run(buf0, 16, stream=get_raw_stream(0))",
        "    extern_kernels.mm(reinterpret_tensor(buf0, (4, 4), (1, 4), 0), buf0, out=buf0)",
        "    buf1 = torch.ops.aten._some_attention.default(buf0)",
        "    buf2 = buf0[0:4].view(2, 8).sum(dim=0).view([1, 8])",
        "    return (unheard_of(buf2), )",
        "def benchmark(): kernel.run()",
    ]
    assert called("\n".join(lines)) == {"Triton": 1, "mm": 1, "_some_attention": 1, "sum": 1, "unheard_of": 1}
    with pytest.raises(ValueError, match="branches"):
        called("\n".join([*lines[:4], "    for _ in range(2): kernel.run()"]))


def counts_of(masked: float, triton: float, kernels: float) -> dict[str, dict[str, float]]:
    """What a child reports, in short."""
    recorded: dict[str, dict[str, float]] = json.loads(benchmark.RECORDED.read_text())["counts"]
    products = {
        name: {**found, "masked": masked * found["dense"]} for name, found in recorded.items() if "dense" in found
    }
    loss = {"loss": {**recorded["loss"], "launches of Triton": 1, "bytes a logit": triton}}
    micro_batch = {"micro-batch, tiny": {**recorded["micro-batch, tiny"], "kernels": kernels}}
    return {**recorded, **products, **loss, **micro_batch, "compiled loss": {"bytes a logit": 29.0}}


@pytest.mark.parametrize(
    "masked, triton, share, verdicts",
    [(1.07, 11.5, 0.24, {"met"}), (1.09, 12.5, 0.26, {"missed"})],
)
def test_goals_are_ratios_to_dense_layers_to_bytes_and_to_the_code_before(
    masked: float, triton: float, share: float, verdicts: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads(benchmark.RECORDED.read_text())
    here = counts_of(masked, triton, share * before["counts"]["micro-batch, tiny"]["kernels"])
    monkeypatch.setattr(benchmark, "counted", lambda *_: {"counts": here})
    results = list(benchmark.measure(Settings(quick=True)))
    compared = [each for each in results if each.goal is not None and ": " not in each.case]
    named = {(each.question, each.case): each.verdict.split(":")[0] for each in compared}
    assert named.pop(("loss, a logit", benchmark.COMPILED)) == "met"
    assert len(named) == 6 and set(named.values()) == verdicts
    assert f"commit {before['commit']}" in {each.against for each in results}


def test_a_checkout_without_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Counting failed: Error: --code .* has no ast_sparse"):
        benchmark.counted(True, tmp_path)
