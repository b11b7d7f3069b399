import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ast_sparse.sparsity.layers import SparseConv1D, make_dense, make_sparse, pack_bits, unpack_bits
from ast_sparse.sparsity.masks import Pattern, nm_mask
from tests.sparsity.small_layers import sparse_linear


def test_output_is_the_product_with_the_masked_weight() -> None:
    layer = sparse_linear()
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = torch.stack(
        [sum(x[:, j] * layer.weight[o, j] for j in range(8) if layer.mask[o, j]) + layer.bias[o] for o in range(3)]
    ).T
    torch.testing.assert_close(layer(x), expected)


def test_gradient_reaches_pruned_weights_unchanged() -> None:
    layer = sparse_linear()
    x, upstream = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    layer(x).backward(upstream)
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x)  # (1): the gradient of the masked weight, all of it


def test_pruned_weights_of_a_fixed_mask_get_no_gradient() -> None:
    layer = sparse_linear(fixed=True)
    x, upstream = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    layer(x).backward(upstream)
    torch.testing.assert_close(layer.weight.grad, torch.where(layer.mask, upstream.T @ x, 0))


@pytest.mark.parametrize("family", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, "autocast"])
def test_output_and_gradients_are_those_of_autograd_to_the_bit(family: str, dtype: torch.dtype | str) -> None:
    torch.manual_seed(0)
    own = torch.float32 if dtype == "autocast" else dtype
    layer = nn.Linear(8, 12, dtype=own) if family == "linear" else Conv1D(12, 8).to(own)
    mask = nm_mask(torch.rand(12, 8))
    make_sparse(layer, mask if family == "linear" else mask.t(), Pattern(2, 4))
    x = torch.randn(2, 5, 8, dtype=own, requires_grad=True)
    inputs = [x, layer.weight, layer.bias]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "autocast"):
        through = layer.weight + (torch.where(layer.mask, layer.weight, 0) - layer.weight).detach()
        through = torch.where(layer.mask, through, through - through.detach())  # exactly 0.0 where pruned
        if family == "linear":
            expected = nn.functional.linear(x, through, layer.bias)
        else:
            expected = torch.addmm(layer.bias, x.view(-1, 8), through).view(2, 5, 12)
        result = layer(x)
    assert result.dtype == expected.dtype and torch.equal(result, expected)
    outside = torch.randn_like(result)
    grads, expected_grads = (torch.autograd.grad(output, inputs, outside) for output in (result, expected))
    for grad, twin in zip(grads, expected_grads, strict=True):
        assert grad.dtype == twin.dtype and torch.equal(grad, twin)


def test_no_copy_of_the_weight_is_kept_for_the_backward_pass() -> None:
    layer, x = sparse_linear(), torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        layer(x)
    assert sorted(kept) == sorted(each.data_ptr() for each in (x, layer.weight, layer.mask))


def test_input_of_another_dtype_is_an_error_as_in_a_dense_layer() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        sparse_linear()(torch.randn(5, 8))


def test_masked_weight_has_no_negative_zero() -> None:
    layer = sparse_linear()
    pruned = layer.masked_weight()[~layer.mask]
    assert not torch.signbit(pruned).any()


def test_conv1d_keeps_its_layout_and_groups_along_its_input() -> None:
    torch.manual_seed(0)
    conv = Conv1D(6, 8)  # weight [in=8, out=6]
    linear = nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    make_sparse(conv, nm_mask(conv.weight.abs().t()).t(), Pattern(2, 4))
    make_sparse(linear, nm_mask(linear.weight.abs()), Pattern(2, 4))
    assert isinstance(conv, SparseConv1D) and conv.weight.shape == (8, 6)
    assert torch.equal(conv.mask.t(), linear.mask)
    assert torch.equal(conv.magnitude_mask(), conv.mask)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(conv(x), linear(x))


@pytest.mark.parametrize("layer", [nn.Linear(8, 3), nn.Linear(8, 3, bias=False), Conv1D(3, 8)])
def test_make_dense_restores_the_class_with_the_masked_weight(layer: nn.Module) -> None:
    original = type(layer)
    keys = set(layer.state_dict())
    dim = 0 if original is Conv1D else 1
    mask = nm_mask(layer.weight.abs().movedim(dim, -1)).movedim(-1, dim)
    expected = torch.where(mask, layer.weight, 0)
    sparse = make_sparse(layer, mask, Pattern(2, 4))
    make_dense(sparse)
    assert type(layer) is original
    assert set(layer.state_dict()) == keys
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize(("shape", "dim"), [((3, 16), 1), ((3, 12), 1), ((12, 5), 0)])
def test_packed_bits_come_back(shape: tuple[int, int], dim: int) -> None:
    mask = torch.rand(shape) < 0.5
    packed = pack_bits(mask, dim)
    assert packed.dtype == torch.uint8 and packed.shape[dim] == -(-shape[dim] // 8)
    assert torch.equal(unpack_bits(packed, dim).narrow(dim, 0, shape[dim]), mask)
