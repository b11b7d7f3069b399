"""When the kernels of the GPU are used, and how the fastest way is chosen."""

import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ast_sparse.errors import UserError
from ast_sparse.kernels.code24 import pack24
from ast_sparse.kernels.gpu import cusparselt, dispatch, fastest, plans, prefill
from ast_sparse.kernels.linear24 import linear24
from ast_sparse.sparsity.masks import nm_mask


def test_products_and_losses_on_the_cpu_neither_use_nor_import_triton() -> None:
    code = (
        "import sys, torch; from ast_sparse.kernels.linear24 import linear24;"
        "from ast_sparse.distillation.logits import distillation_loss;"
        "linear24(torch.ones(1, 8), torch.ones(2, 4), torch.full((2, 1), 68, dtype=torch.uint8));"
        "distillation_loss(torch.ones(1, 8), None, torch.tensor([3]), None);"
        "print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_an_unknown_setting_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AST_SPARSE_GPU", "fast")
    with pytest.raises(UserError, match=r"AST_SPARSE_GPU is 'fast'\. Set it to auto, fixed or plain\.$"):
        dispatch.setting()


def test_the_setting_plain_leaves_every_product_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton is imported already, so its kernels must not run here
    monkeypatch.setattr(dispatch, "fault", lambda device: None)
    torch.manual_seed(0)
    values, meta = pack24(torch.randn(8, 16), nm_mask(torch.rand(8, 16)))
    x = torch.randn(2, 16)
    assert dispatch.takes(x, values, meta)
    monkeypatch.setenv("AST_SPARSE_GPU", "plain")
    assert not dispatch.takes(x, values, meta)
    assert linear24(x, values, meta).shape == (2, 8)


def test_kernels_that_fail_are_named_in_one_line_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # but compiled kernels refuse CPU tensors
    device = torch.device("cpu")
    dispatch.fault.cache_clear()
    try:
        values, meta = pack24(torch.randn(8, 16), nm_mask(torch.rand(8, 16)))
        assert not dispatch.takes(torch.randn(2, 16), values, meta)
        assert linear24(torch.randn(2, 16), values, meta).shape == (2, 8)
        assert dispatch.fault(device)
    finally:
        dispatch.fault.cache_clear()
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.message
    assert record.message.startswith("2:4 products decode the weights in every call on cpu: ")


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    dispatch.fault.cache_clear()
    try:
        assert dispatch.fault(torch.device("cpu")) == "triton is not installed."
    finally:
        dispatch.fault.cache_clear()


def test_the_fastest_way_is_measured_once_and_a_failing_one_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fastest, "_chosen", {})
    calls: list[str] = []

    def way(name: str) -> Any:
        def call() -> Tensor:
            calls.append(name)
            if name == "broken":
                raise RuntimeError("no such kernel here")
            return torch.zeros(1)

        return call

    def bench(call: Any, **_: Any) -> float:
        call()
        return {"slow": 3.0, "quick": 1.0}[calls[-1]]

    monkeypatch.setattr(fastest, "do_bench", bench)
    ways = {name: way(name) for name in ("slow", "broken", "quick")}
    assert [fastest.fastest("key", "a product", ways) for _ in range(3)] == ["quick"] * 3
    assert calls == ["slow", "broken", "quick"] and fastest.remembered("key") == "quick"
    [record] = caplog.records
    assert record.message == "a product: quick (1.0000 ms, slow 3.0000, broken inf)."
    assert fastest.fastest("other", "a product", {"broken": ways["broken"]}) == "broken"
    assert fastest.remembered("third") is None


def test_while_a_graph_is_captured_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(fastest, "do_bench", pytest.fail)
    x: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=torch.float16, shape=(100, 64))
    ways = {name: lambda: torch.zeros(1) for name in ("tiles", "decoded", "cusparselt")}
    for measured, chosen in ((None, "tiles"), ("decoded", "decoded"), ("cusparselt", "tiles"), ("cutlass", "tiles")):
        known = {} if measured is None else {(x.device, x.dtype, 32, 64, 128): measured}
        monkeypatch.setattr(fastest, "_chosen", known)
        assert dispatch._chosen(x, 32, 128, ways) == chosen


def test_fixed_takes_the_first_way_and_auto_measures_each_dtype_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(dtype: torch.dtype = torch.float16, columns: int = 64) -> Any:
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda:0"), dtype=dtype, shape=(100, columns))

    measured: list[Any] = []
    milliseconds = iter([2.0, 1.0, *[1.0, 2.0] * 4])  # of the first product, and of those after it

    def bench(way: Any, **_: Any) -> float:
        measured.append(way)
        return next(milliseconds)

    ways = {name: lambda: torch.zeros(1) for name in ("tiles", "decoded")}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fastest, "do_bench", bench)
    monkeypatch.setattr(fastest, "_chosen", {(product().device, torch.float16, 32, 64, 128): "decoded"})
    monkeypatch.setenv("AST_SPARSE_GPU", "fixed")
    assert dispatch._chosen(product(), 32, 128, ways) == "tiles" and not measured
    monkeypatch.setattr(fastest, "_chosen", {})
    monkeypatch.setenv("AST_SPARSE_GPU", "auto")
    assert [dispatch._chosen(product(), 32, 128, ways) for _ in range(2)] == ["decoded"] * 2
    assert len(measured) == 2  # each way once
    others = [(product(torch.bfloat16), 32, 128), (product(columns=128), 32, 128), (product(), 64, 128)]
    for x, rows, most in [*others, (product(), 32, 256)]:
        assert dispatch._chosen(x, rows, most, ways) == "tiles"
    assert len(measured) == 10


def test_semi_structured_products_are_tried_where_pytorch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(rows: int = 64, columns: int = 128, dtype: torch.dtype = torch.bfloat16, gpu: int = 0) -> list[str]:
        return prefill.semi_structured(rows, columns, dtype, torch.device("cuda", gpu))

    monkeypatch.setattr(cusparselt, "_handles", {})
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert names() == ["cutlass", "cusparselt"] and names(gpu=1) == ["cutlass"]
    assert names(1 << 16, 1 << 15) == ["cutlass"]  # too large to be decoded at once
    assert names(48) == names(columns=96) == names(dtype=torch.float32) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert names() == ["cusparselt"] and names(gpu=1) == []


def test_numbers_of_tokens_that_are_measured_together_have_the_same_candidates() -> None:
    tokens = (1, 2, 3, 4, 5, 16, 17, 32, 33, 64, 65, 256, 257, 8192, 100_000)
    assert [dispatch._group(each) for each in tokens] == [1, 2, 4, 4, 16, 16, 32, 32, 64, 64, 128, 256, 512, 8192, 8192]
    for each in range(1, 600):
        most = dispatch._group(each)
        assert (each <= dispatch._TILES) == (most <= dispatch._TILES)
        assert (each >= dispatch._DECODED) == (most >= dispatch._DECODED)
        assert (each >= dispatch._SEMI_STRUCTURED) == (most >= dispatch._SEMI_STRUCTURED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows, columns", [(8, 8), (1024, 4096), (4096, 4096), (11008, 4096), (4096, 11008)])
def test_plans_fill_the_gpu_and_give_every_part_columns(rows: int, columns: int, dtype: torch.dtype) -> None:
    for tokens in (1, 2, 3, 4, 5, 16, 17, 100, 256):
        for plan in plans.plans(tokens, rows, columns, dtype, 132):
            programs = -(-rows // plan.rows) * plan.parts * -(-tokens // plan.tokens)
            steps = -(-columns // (8 * plan.units))
            assert plan.parts <= steps
            assert programs >= 3 * 132 or 2 * plan.parts > steps
            if plan.kernel == "vectors":
                assert plan.tokens >= tokens and plan.units < 32 * plan.warps
            else:
                assert plan.kernel == "tiles" and tokens > 1 and plan.tokens >= min(tokens, 64)
                assert dtype == torch.bfloat16 or plan.rows < 64  # else TF32 on some GPUs
