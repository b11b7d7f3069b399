"""The 2:4 code against slow twins in plain Python."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ast_sparse.export.codec24 import CODE24
from ast_sparse.kernels.code24 import check_meta, pack24, same_bits, unpack24
from ast_sparse.kernels.cpu import setting, words
from ast_sparse.sparsity.masks import nm_mask

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=[False, True], ids=["plain", "words"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """The plain way, and that of `kernels/cpu/words.py`."""
    monkeypatch.setattr(setting, "is_enabled", lambda: request.param)
    yield request.param


def slow_pack(weight: Tensor, mask: Tensor) -> tuple[list[list[float]], list[list[int]]]:
    values, meta = [], []
    for row, kept in zip(weight.tolist(), mask.tolist(), strict=True):
        nibbles = []
        for start in range(0, len(row), 4):
            first, second = (i for i in range(4) if kept[start + i])
            nibbles.append(first + 4 * second)
        values.append([value for value, keep in zip(row, kept, strict=True) if keep])
        meta.append([low + 16 * high for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)])
    return values, meta


def slow_unpack(values: Tensor, meta: Tensor) -> list[list[float]]:
    dense = []
    for row, bytes_ in zip(values.tolist(), meta.tolist(), strict=True):
        nibbles = [nibble for byte in bytes_ for nibble in (byte % 16, byte // 16)]
        line = [0.0] * (2 * len(row))
        for group, nibble in enumerate(nibbles):
            line[4 * group + nibble % 4] = row[2 * group]
            line[4 * group + nibble // 4] = row[2 * group + 1]
        dense.append(line)
    return dense


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("block", [1 << 18, 34])  # groups; 780 is not a multiple of 34
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_and_unpack_equal_their_slow_twins(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "_BLOCK", block)
    torch.manual_seed(0)
    weight = torch.randn(130, 24).to(dtype)  # more than two blocks of rows
    mask = nm_mask(torch.rand(130, 24))
    values, meta = pack24(weight, mask)
    slow_values, slow_meta = slow_pack(weight, mask)
    assert values.dtype == dtype and values.tolist() == slow_values
    assert meta.dtype == torch.uint8 and meta.tolist() == slow_meta
    dense = unpack24(values, meta)
    assert dense.dtype == dtype and dense.tolist() == slow_unpack(values, meta)
    assert torch.equal(dense, torch.where(mask, weight, 0))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("shift", (0, 1), ids=("aligned", "shifted"))
def test_every_bit_of_the_kept_values_survives(dtype: torch.dtype, shift: int) -> None:
    """Also of negative zeros and NaN payloads, and of tensors that do not begin at a whole word."""
    torch.manual_seed(0)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limit = torch.iinfo(integer)
    bits = torch.randint(limit.min, limit.max, (70 * 24 + shift,), dtype=integer)
    bits[::5] = limit.min  # the negative zero
    mask = torch.cat((torch.zeros(shift, dtype=torch.bool), nm_mask(torch.rand(70, 24)).flatten()))[shift:].view(70, 24)
    weight = bits[shift:].view(70, 24)
    values, meta = pack24(weight.view(dtype), mask)
    slow_values, slow_meta = slow_pack(weight, mask)
    assert values.view(integer).tolist() == slow_values and meta.tolist() == slow_meta
    moved = torch.empty(values.numel() + shift, dtype=integer)[shift:].view(values.shape)
    moved.copy_(values.view(integer))
    assert torch.equal(unpack24(moved.view(dtype), meta).view(integer), torch.where(mask, weight, 0))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_other_occupancy_of_a_group_is_refused(dtype: torch.dtype) -> None:
    for occupancy in range(16):
        kept = [bool(occupancy >> i & 1) for i in range(4)]
        if sum(kept) != 2:
            with pytest.raises(ValueError, match="exactly two"):
                pack24(torch.zeros(1, 8, dtype=dtype), torch.tensor([[True, True, False, False, *kept]]))


def test_pruned_entries_are_never_negative_zero() -> None:
    dense = unpack24(*pack24(-torch.ones(3, 16), nm_mask(torch.rand(3, 16))))
    assert not (dense == 0).logical_and(dense.signbit()).any()


def test_all_pairs_of_patterns_come_back() -> None:
    patterns = [[i in pair for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    mask = torch.tensor([a + b for a in patterns for b in patterns])
    weight = torch.arange(1.0, mask.numel() + 1).view_as(mask)
    values, meta = pack24(weight, mask)
    assert torch.equal(unpack24(values, meta), weight * mask)
    assert check_meta(meta) and meta.unique().numel() == 36


def test_two_bytes_of_metadata_are_a_cutlass_word() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1]]).bool()
    _, meta = pack24(torch.ones(1, 16), mask)
    # 4, 8, 9, 14: idx0 | idx1 << 2 of the four groups, the first in the lowest bits
    assert meta.view(torch.int16).item() & 0xFFFF == 0xE984


def test_kept_zero_stays_kept() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 0.0, 1.0, 0.0, 2.0, 0.0]])
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0]]).bool()
    values, meta = pack24(weight, mask)
    assert values.tolist() == [[0.0, 5.0, 1.0, 2.0]]
    assert meta.tolist() == [[0 + 4 * 1 + 16 * (0 + 4 * 2)]]


def test_without_a_mask_short_groups_are_filled_with_zeros() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0]])
    values, meta = pack24(weight)
    assert check_meta(meta)
    assert torch.equal(unpack24(values, meta), weight)


def test_metadata_check_knows_the_valid_bytes() -> None:
    valid = {first + 4 * second for first, second in itertools.combinations(range(4), 2)}
    for byte in range(256):
        expected = byte % 16 in valid and byte // 16 in valid
        assert check_meta(torch.tensor([[0x44, byte]], dtype=torch.uint8)) is expected
        for place in range(11):  # in each byte of a word, and after the last whole one; neighbours at both ends
            for around in (0x44, 0xEE):
                meta = torch.full((1, 12), around, dtype=torch.uint8)
                meta[0, place] = byte
                assert check_meta(meta[:, :11]) is expected and check_meta(meta[:, 1:]) is (expected or place == 0)


def test_metadata_check_reads_every_block_of_rows() -> None:
    meta = torch.full((200, 2), 0x44, dtype=torch.uint8)
    assert check_meta(meta)
    meta[199, 1] = 0
    assert not check_meta(meta)


@pytest.mark.usefixtures("either_way")
def test_a_faulty_group_in_any_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_BLOCK", 6)
    for group in range(32):
        mask = nm_mask(torch.rand(4, 32))
        mask.view(-1)[4 * group : 4 * group + 4] = True
        with pytest.raises(ValueError, match="exactly two"):
            pack24(torch.ones(4, 32, dtype=torch.bfloat16), mask)


@pytest.mark.usefixtures("either_way")
def test_a_default_device_changes_nothing() -> None:
    weight, mask = torch.randn(4, 16).bfloat16(), nm_mask(torch.rand(4, 16))
    with torch.device("meta"):
        dense = unpack24(*pack24(weight, mask))
    assert torch.equal(dense, torch.where(mask, weight, 0))


def test_one_block_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask = torch.randn(4, 16), nm_mask(torch.rand(4, 16))
    monkeypatch.setattr(torch, "cat", None)
    assert torch.equal(unpack24(*pack24(weight, mask)), torch.where(mask, weight, 0))
    assert torch.equal(unpack24(*pack24(weight * mask)), weight * mask)


def test_same_bits_sees_what_equality_does_not() -> None:
    for dtype in (*DTYPES, torch.uint8, torch.bool, torch.int64):
        for shape in ((), (0, 4), (3,), (5, 7)):
            tensor = (10 * torch.randn(shape)).to(dtype)
            assert same_bits(tensor, tensor.clone())
            for place in range(tensor.numel()):
                other = tensor.clone()
                other.view(-1).view(torch.uint8)[place * dtype.itemsize] ^= 1
                assert not same_bits(tensor, other)
    zeros, nan = torch.zeros(9), torch.full((9,), torch.nan)
    assert not same_bits(zeros, -zeros) and same_bits(nan, nan.clone())
    assert not same_bits(zeros, zeros.double()) and not same_bits(zeros, zeros.view(3, 3))
    grid = torch.randn(7, 9)
    assert same_bits(grid.t(), grid.t().contiguous()) and same_bits(grid[:, 1:], grid[:, 1:].clone())


def test_a_compiled_layer_decodes_as_an_eager_one() -> None:
    values, meta = pack24(torch.randn(4, 16).bfloat16(), nm_mask(torch.rand(4, 16)))
    compiled = torch.compile(unpack24, backend="eager", fullgraph=True)
    assert torch.equal(compiled(values, meta), unpack24(values, meta))


def test_code_takes_nine_bits_a_weight() -> None:
    values, meta = pack24(torch.zeros(16, 64, dtype=torch.bfloat16))
    assert values.nbytes + meta.nbytes == CODE24.stored_bytes(16, 64, 2) == 0.5625 * 2 * 16 * 64


def test_gradients_reach_the_values() -> None:
    mask = nm_mask(torch.rand(2, 8))
    values, meta = pack24(torch.ones(2, 8), mask)
    scale = torch.arange(16.0).view(2, 8)
    values.requires_grad_()
    (unpack24(values, meta) * scale).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, scale[mask].view(2, 4))


@pytest.mark.parametrize("shape", [(8,), (2, 4, 8), (4, 12), (4, 10)])
def test_weight_without_pairs_of_groups_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack24(torch.zeros(shape))


def test_wrong_masks_and_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="exactly two"):
        pack24(torch.zeros(1, 8), torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0]]).bool())
    with pytest.raises(ValueError, match="2 groups of four hold more than two"):
        pack24(torch.ones(1, 8))
    with pytest.raises(ValueError, match="The mask is"):
        pack24(torch.zeros(1, 8), torch.ones(1, 4).bool())
    with pytest.raises(ValueError, match="The mask is"):
        pack24(torch.zeros(1, 8), torch.ones(1, 8))


@pytest.mark.parametrize(
    "meta", [torch.zeros(2, 1), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)]
)
def test_metadata_that_does_not_fit_is_refused(meta: Tensor) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        unpack24(torch.zeros(2, 4), meta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decoding_passes_forward_mode_gradients(dtype: torch.dtype) -> None:
    values, meta = torch.randn(3, 8).to(dtype), torch.full((3, 2), 0x94, dtype=torch.uint8)
    _, tangent = torch.func.jvp(lambda values: unpack24(values, meta), (torch.zeros_like(values),), (values,))
    assert torch.equal(tangent, unpack24(values, meta))
