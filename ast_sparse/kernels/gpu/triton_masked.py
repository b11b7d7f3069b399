"""The Triton kernel of `masked_cast.py`: `m ⊙ W` in another dtype, in one pass."""

# mypy: disable-error-code="no-untyped-def"
# what Triton compiles has its own types: tensors of `tl`, and `tl.constexpr`

import triton
import triton.language as tl


@triton.jit
def _bfloat16_bits(value):
    """The upper half of float32 numbers as int16, rounded to the nearest, ties to even; NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (tl.where(value == value, rounded, 0x7FC00000) >> 16).to(tl.int16)


@triton.jit
def masked_cast(values, mask, out, count, AS_BITS: tl.constexpr, SIZE: tl.constexpr):
    """`out = values where mask, else +0.0`, rounded once to the dtype of out; a program writes SIZE entries.

    values: bfloat16, float16 or float32; mask: uint8, 0 where pruned; out: one of the three dtypes; each `[count]`.

    Args:
        AS_BITS: convert from and to bfloat16 by its bits, for the interpreter: its conversions cut off and lose
            subnormal numbers.
    """
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    from_dtype: tl.constexpr = values.dtype.element_ty
    to_dtype: tl.constexpr = out.dtype.element_ty
    kept = tl.load(mask + at, mask=inside, other=0) != 0
    value = tl.load(values + at, mask=inside, other=0.0)
    if from_dtype != to_dtype:  # a float32 between two 16-bit dtypes is exact
        if AS_BITS and from_dtype == tl.bfloat16:
            value = (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        elif from_dtype == tl.bfloat16:
            value = value.to(tl.float32)
        if AS_BITS and to_dtype == tl.bfloat16:
            value = _bfloat16_bits(value.to(tl.float32)).to(tl.bfloat16, bitcast=True)
        else:
            value = value.to(to_dtype)
    tl.store(out + at, tl.where(kept, value, tl.zeros_like(value)), mask=inside)
