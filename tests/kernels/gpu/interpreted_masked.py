"""Tests of the kernel that masks and casts in Triton's interpreter; `test_triton24.py` runs this file."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from ast_sparse.kernels.gpu import masked_cast
from ast_sparse.kernels.gpu.masked_cast import takes
from ast_sparse.kernels.products import masked, masked_as
from ast_sparse.sparsity.layers import make_sparse
from ast_sparse.sparsity.masked_piece import MaskedPiece
from ast_sparse.sparsity.masks import Pattern, nm_mask
from ast_sparse.sparsity.model import use_masked_weights
from tests.sparsity.test_masked_piece import gathered

BF16, FP16, FP32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def bits(tensor: Tensor) -> Tensor:
    """The bits, with all NaNs made the same one."""
    word = torch.int16 if tensor.element_size() == 2 else torch.int32
    return tensor.masked_fill(tensor.isnan(), torch.nan).view(word)


def numbers(count: int, dtype: torch.dtype) -> Tensor:
    """Of all magnitudes of the dtype: any bits that there are, then halves between bfloat16 and float16 numbers."""
    generator = torch.Generator().manual_seed(count)
    word = torch.int16 if dtype.itemsize == 2 else torch.int32
    info = torch.iinfo(word)
    any_bits = torch.randint(info.min, info.max, (count,), generator=generator, dtype=word).view(dtype)
    ties = torch.tensor([1 + odd * 2.0**-power for power in (8, 9, 11, 12) for odd in (1, 3, 5)], dtype=dtype)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.4e38, 65519.0, 65520.0, 1e-40, 6e-8, -3e-8])
    nans = torch.tensor([info.max, -1], dtype=word).view(dtype)  # rounding their bits up would give -0.0 and 0.0
    found = torch.cat([nans, special.to(dtype), ties, -ties, any_bits])
    return found[:count].clone()


@pytest.mark.parametrize("to_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_dtype", DTYPES, ids=str)
def test_bits_are_those_of_where_and_a_cast(from_dtype: torch.dtype, to_dtype: torch.dtype) -> None:
    for count in (1, 1024, 2049):
        values = numbers(count, from_dtype)
        mask = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
        assert takes(values, mask, to_dtype)
        for each in (mask, ~mask):
            found, expected = masked_cast.masked_cast(values, each, to_dtype), torch.where(each, values, 0).to(to_dtype)
            assert found.dtype == to_dtype and torch.equal(bits(found), bits(expected))
        assert not torch.signbit(masked_as(values, mask, to_dtype)[~mask]).any()


def test_a_matrix_keeps_its_shape_and_what_the_kernel_does_not_take_is_made_by_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, mask = torch.randn(12, 20), torch.rand(12, 20) < 0.5
    launched: list[torch.Size] = []
    kernel = masked_cast.masked_cast
    monkeypatch.setattr(masked_cast, "masked_cast", lambda *args: launched.append(args[0].shape) or kernel(*args))
    cases = [
        (weight, mask, BF16, 1),
        (nn.Parameter(weight), nn.Parameter(mask, requires_grad=False), BF16, 1),
        (weight[2:9], mask[2:9], BF16, 1),  # rows; not at 16 bytes
        (weight.t(), mask.t(), BF16, 0),
        (weight, mask.t().contiguous().t(), BF16, 0),
        (weight[:, ::2], mask[:, ::2], BF16, 0),
        (weight.double(), mask, BF16, 0),
        (weight, mask, torch.float64, 0),
        (weight[:0], mask[:0], BF16, 0),
        (weight.as_subclass(MaskedPiece), mask, BF16, 0),
    ]
    for values, where, dtype, count in cases:
        launched.clear()
        found = masked_as(values, where, dtype)
        assert len(launched) == count and found.dtype == dtype and not found.requires_grad
        assert torch.equal(found, torch.where(where, values, 0).to(dtype))
    monkeypatch.setenv("AST_SPARSE_GPU", "plain")
    assert not takes(weight, mask, BF16)


def test_layers_and_fsdp_go_through_the_kernel_with_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 10)
    make_sparse(layer, nm_mask(layer.weight.abs()), Pattern(2, 4))
    x, outside = torch.randn(5, 24, requires_grad=True), torch.randn(5, 10).bfloat16()
    piece = layer.weight.detach().as_subclass(MaskedPiece)
    piece.mask = layer.mask.detach()
    launched: list[int] = []
    kernel = masked_cast.masked_cast
    monkeypatch.setattr(masked_cast, "masked_cast", lambda *args: launched.append(1) or kernel(*args))

    def results() -> list[Tensor]:
        launched.clear()
        with torch.autocast("cpu", BF16):
            output = layer(x)
        grads = torch.autograd.grad(output, [x, layer.weight], outside)
        return [output, *grads, gathered(piece, 40, BF16)]

    with monkeypatch.context() as patch:
        patch.setenv("AST_SPARSE_GPU", "plain")
        expected = results()
        assert not launched
    for choice, count in (("made", 3), ("kept", 2)):
        use_masked_weights(layer, choice)
        found = results()
        assert len(launched) == count  # the gathered piece, and once or twice the layer
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_kernel_that_fails_or_is_wrong_is_named_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight, mask = torch.randn(4, 8), torch.rand(4, 8) < 0.5
    device = weight.device

    def fails(*_: object) -> Tensor:
        raise RuntimeError("no compiler\nat all")

    for broken, reason in ((fails, "RuntimeError: no compiler"), (lambda v, m, d: v.to(d), "wrong results")):
        masked_cast.fault.cache_clear()
        caplog.clear()
        with monkeypatch.context() as patch:
            patch.setattr(masked_cast, "masked_cast", broken)
            for _, dtype in itertools.product(range(2), (BF16, FP16)):
                assert torch.equal(masked_as(weight, mask, dtype), masked(weight, mask).to(dtype))
            assert reason in str(masked_cast.fault(device)) and len(caplog.records) == 1
    masked_cast.fault.cache_clear()
    assert masked_cast.fault(device) is None
