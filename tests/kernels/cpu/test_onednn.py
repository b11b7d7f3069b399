"""Products through oneDNN against float64, and when PyTorch itself computes them."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from ast_sparse.kernels.cpu import onednn, setting
from ast_sparse.kernels.products import add_product, linear, product


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As on a CPU where oneDNN is faster, for products of any size; each of them is added to the list."""
    calls: list[int] = []
    inner = onednn.product

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return inner(*args)

    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(onednn, "_WORTHWHILE", 0)
    monkeypatch.setattr(onednn, "product", counted)
    yield calls


@pytest.mark.parametrize("group_dim", [1, 0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_through_onednn_equals_float64(calls: list[int], group_dim: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 7, 24), torch.randn(10, 24), torch.randn(10)
    x[0, 0], weight[0] = 0, 0
    outside = torch.randn(10, 3, 7).permute(1, 2, 0)  # a gradient that is not contiguous
    tensors = [x, weight.t().contiguous() if group_dim == 0 else weight, *([bias] if has_bias else [])]
    twins = [tensor.double().requires_grad_() for tensor in tensors]
    expected = twins[0] @ (twins[1] if group_dim == 0 else twins[1].t()) + (twins[2] if has_bias else 0)
    expected_grads = torch.autograd.grad(expected, twins, outside.double())
    for tensor in tensors:
        tensor.requires_grad_()
    result = linear(*tensors, group_dim=group_dim)
    grads = torch.autograd.grad(result, tensors, outside)
    assert len(calls) == 3
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    for grad, twin, tensor in zip(grads, expected_grads, tensors, strict=True):
        assert grad.stride() == tensor.stride()  # autograd copies a gradient of another layout
        torch.testing.assert_close(grad.double(), twin, rtol=1e-5, atol=1e-5)


def test_only_the_requested_gradients_are_computed(calls: list[int]) -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert len(calls) == 2
    linear(x, weight.detach())
    assert len(calls) == 3


def test_products_without_gradients_equal_float64(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_BLOCK", 2 * 4)  # two rows of the target
    left, right, target = torch.randn(5, 9), torch.randn(4, 9).t(), torch.randn(5, 4)
    expected = left.double() @ right.double()
    torch.testing.assert_close(product(left, right).double(), expected, rtol=1e-5, atol=1e-5)
    total = target.clone()
    add_product(total, left, right)
    torch.testing.assert_close(total.double(), target.double() + expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1 + 3


@pytest.mark.parametrize(
    ("dtype", "inside"),
    [
        (torch.float64, nullcontext),
        (torch.bfloat16, nullcontext),
        (torch.float32, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        (torch.float32, lambda: torch.backends.mkldnn.flags(enabled=False)),
    ],
)
def test_what_onednn_would_change_is_computed_by_pytorch(
    calls: list[int], dtype: torch.dtype, inside: Callable[[], Any]
) -> None:
    x, weight, bias = torch.randn(2, 3, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype), torch.randn(6, dtype=dtype)
    with inside():
        expected = torch.nn.functional.linear(x, weight, bias)
        assert torch.equal(linear(x, weight, bias), expected)
        torch.testing.assert_close(linear(x, weight.t().contiguous(), bias, group_dim=0), expected)
        torch.testing.assert_close(
            linear(x, weight.t().contiguous(), group_dim=0), torch.nn.functional.linear(x, weight)
        )
        assert product(x[0], weight.t()).dtype == expected.dtype
    assert not calls


def test_small_products_and_other_processors_use_pytorch(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    monkeypatch.setattr(onednn, "_WORTHWHILE", 4 * 8 * 6 + 1)
    linear(x, weight)
    assert not calls
    monkeypatch.setattr(onednn, "_WORTHWHILE", 4 * 8 * 6)
    linear(x, weight)
    assert len(calls) == 1
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    linear(x, weight)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("capabilities", "faster"),
    [
        ({"cpu_name": "AMD EPYC 9B45", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC 7B13", "avx512_f": False}, False),
        ({"cpu_name": "INTEL(R) XEON(R) PLATINUM 8481C", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_onednn_is_used_on_processors_where_mkl_uses_half_the_width(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capabilities: dict[str, Any], faster: bool
) -> None:
    monkeypatch.setattr(setting, "is_enabled", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    with caplog.at_level("INFO"):
        assert onednn.is_faster.__wrapped__() is faster
    assert ("go through oneDNN" in caplog.text) is faster


def test_it_is_not_used_if_the_setting_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "is_enabled", lambda: False)
    assert onednn.is_faster.__wrapped__() is False
