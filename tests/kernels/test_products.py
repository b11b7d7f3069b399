from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ast_sparse.kernels import products
from ast_sparse.kernels.cpu import onednn, setting
from ast_sparse.kernels.products import add_product, linear, masked, product, product_as, product_into
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


def test_products_are_those_of_pytorch_to_the_bit_if_the_setting_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "is_enabled", lambda: False)
    monkeypatch.setattr(onednn, "is_faster", onednn.is_faster.__wrapped__)  # without its cache
    monkeypatch.setattr(onednn, "_WORTHWHILE", 0)
    torch.manual_seed(0)
    x, weight, bias, total = torch.randn(5, 24), torch.randn(10, 24), torch.randn(10), torch.randn(5, 10)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear(x, weight.t(), bias, group_dim=0), torch.addmm(bias, x, weight.t()))
    assert torch.equal(product(x, weight.t()), x @ weight.t())
    expected = torch.addmm(total, x, weight.t())
    add_product(total, x, weight.t())
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_product_is_written_or_added_where_it_stays(dtype: torch.dtype) -> None:
    left, right = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    wide = torch.full((9, 3), 2.0, dtype=torch.promote_types(dtype, torch.float32))
    expected, tolerance = left.double() @ right.double(), 2 * torch.finfo(dtype).eps * 7
    product_into(wide[:5], left, right)
    torch.testing.assert_close(wide[:5].double(), expected, rtol=tolerance, atol=tolerance)
    product_into(wide[:5], left, right, add=True)
    torch.testing.assert_close(wide[:5].double(), 2 * expected, rtol=tolerance, atol=2 * tolerance)
    assert (wide[5:] == 2).all()
    found = product_as(left, right, wide.dtype)
    assert found.dtype == wide.dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_gpu_writes_the_product_of_16_bits_in_float32_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_adds_in_float32", lambda dtype, wide, device: True)
    called: list[tuple[str, torch.dtype]] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                called.append((str(func), result.dtype))
            return result

    with FakeTensorMode():
        left, right = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in ((5, 7), (7, 3)))
        with Calls():
            product_as(left, right, torch.float32)
            product_as(left, right, torch.bfloat16)
    assert called == [("aten.mm.dtype", torch.float32), ("aten.mm.default", torch.bfloat16)]


def test_a_device_that_cannot_add_16_bit_products_in_float32_is_named(caplog: pytest.LogCaptureFixture) -> None:
    products._added_in_float32.cache_clear()
    device = torch.device("cpu")  # PyTorch has these products for GPUs only
    assert not any(products._adds_in_float32(torch.bfloat16, torch.float32, device) for _ in range(2))
    [record] = caplog.records
    assert record.message.startswith("Gradients of weights are rounded to bfloat16 on cpu: ")
    assert "\n" not in record.message
