from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from ast_sparse.kernels import products
from ast_sparse.kernels.products import add_product, linear, masked, product
from tests.sparsity.small_layers import sparse_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_masked_values_are_those_of_where_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 14, generator=generator)
    values[0, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    values[1, :5] = values[0, :5]
    values, mask = values.to(dtype), torch.rand(9, 14, generator=generator) < 0.5
    mask[0, :5], mask[1, :5] = True, False
    for v, m in ((values, mask), (values.t(), mask.t()), (values[:, ::2], mask[:, ::2]), (values[:0], mask[:0])):
        expected = torch.where(m, v, torch.zeros((), dtype=dtype))
        got = masked(v, m)
        assert got.shape == v.shape and got.dtype == dtype
        bits = [tensor.contiguous().view(torch.uint8) for tensor in (got, expected)]
        assert torch.equal(*bits)
    assert not torch.isnan(masked(values.float(), mask)[1, :5]).any()


def test_a_compiled_layer_is_one_graph_with_the_same_output_and_gradient() -> None:
    layer = sparse_linear().float()
    x = torch.randn(5, 8)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.weight.grad = None
        output = call(x)
        output.square().sum().backward()
        results.append((output.detach(), layer.weight.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As on a CPU where oneDNN is faster, for products of any size; the list grows with each of its products."""
    calls: list[int] = []
    inner = products._onednn

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return inner(*args)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_WORTHWHILE", 0)
    monkeypatch.setattr(products, "_onednn", counted)
    yield calls


@pytest.mark.parametrize("by_input", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_through_onednn_equals_float64(onednn: list[int], by_input: bool, has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 7, 24), torch.randn(10, 24), torch.randn(10)
    x[0, 0], weight[0] = 0, 0
    outside = torch.randn(10, 3, 7).permute(1, 2, 0)  # a gradient that is not contiguous
    tensors = [x, weight.t().contiguous() if by_input else weight, *([bias] if has_bias else [])]
    twins = [tensor.double().requires_grad_() for tensor in tensors]
    expected = twins[0] @ (twins[1] if by_input else twins[1].t()) + (twins[2] if has_bias else 0)
    expected_grads = torch.autograd.grad(expected, twins, outside.double())
    for tensor in tensors:
        tensor.requires_grad_()
    result = linear(*tensors, by_input=by_input)
    grads = torch.autograd.grad(result, tensors, outside)
    assert len(onednn) == 3
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    for grad, twin, tensor in zip(grads, expected_grads, tensors, strict=True):
        assert grad.stride() == tensor.stride()  # autograd copies a gradient of another layout
        torch.testing.assert_close(grad.double(), twin, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_asked_for_are_computed(onednn: list[int]) -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert len(onednn) == 2
    linear(x, weight.detach())
    assert len(onednn) == 3


def test_products_without_gradients_equal_float64(onednn: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_BLOCK", 2 * 4)  # two rows of the target
    left, right, target = torch.randn(5, 9), torch.randn(4, 9).t(), torch.randn(5, 4)
    expected = left.double() @ right.double()
    torch.testing.assert_close(product(left, right).double(), expected, rtol=1e-5, atol=1e-5)
    total = target.clone()
    add_product(total, left, right)
    torch.testing.assert_close(total.double(), target.double() + expected, rtol=1e-5, atol=1e-5)
    assert len(onednn) == 1 + 3


@pytest.mark.parametrize(
    ("dtype", "inside"),
    [
        (torch.float64, nullcontext),
        (torch.bfloat16, nullcontext),
        (torch.float32, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        (torch.float32, lambda: torch.backends.mkldnn.flags(enabled=False)),
    ],
)
def test_what_onednn_would_change_goes_by_pytorch_itself(
    onednn: list[int], dtype: torch.dtype, inside: Callable[[], Any]
) -> None:
    x, weight, bias = torch.randn(2, 3, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype), torch.randn(6, dtype=dtype)
    with inside():
        expected = torch.nn.functional.linear(x, weight, bias)
        assert torch.equal(linear(x, weight, bias), expected)
        torch.testing.assert_close(linear(x, weight.t().contiguous(), bias, by_input=True), expected)
        torch.testing.assert_close(
            linear(x, weight.t().contiguous(), by_input=True), torch.nn.functional.linear(x, weight)
        )
        assert product(x[0], weight.t()).dtype == expected.dtype
    assert not onednn


def test_small_products_and_other_processors_go_by_pytorch_itself(
    onednn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    monkeypatch.setattr(products, "_WORTHWHILE", 4 * 8 * 6 + 1)
    linear(x, weight)
    assert not onednn
    monkeypatch.setattr(products, "_WORTHWHILE", 4 * 8 * 6)
    linear(x, weight)
    assert len(onednn) == 1
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    linear(x, weight)
    assert len(onednn) == 1


@pytest.mark.parametrize(
    ("capabilities", "faster"),
    [
        ({"cpu_name": "AMD EPYC 9B45", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC 7B13", "avx512_f": False}, False),
        ({"cpu_name": "INTEL(R) XEON(R) PLATINUM 8481C", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_onednn_is_taken_on_processors_where_mkl_stops_at_half_the_width(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capabilities: dict[str, Any], faster: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    with caplog.at_level("INFO"):
        assert products.onednn_is_faster.__wrapped__() is faster
    assert ("go through oneDNN" in caplog.text) is faster
