"""The Triton kernels of the 2:4 code. Importing this file imports triton; `dispatch.py` does so when CUDA tensors come.

A **unit** is what one byte of metadata describes: two groups, eight columns, four kept values. With 16-bit values the
values of a unit are one 64-bit word, so values and metadata have the same indices, `row · in/8 + unit`. Both are read
once, side by side, one step ahead of their use. Nothing is gathered from memory: positions choose among registers.

`tl.max_contiguous(…, (1, 2))` asks for two neighbouring units a thread: 16 bytes of values in one load, and
neighbouring threads at neighbouring addresses. Without it a thread would take as many units as fill 16 bytes of
metadata, and its loads of values would lie far apart. In `vectors` UNITS is below the number of threads, so that x is
loaded where it is used, and not passed through shared memory.

The numbers of steps are constants, because the interpreter cannot loop up to a number that is an argument. The number
of tokens must never be one (`do_not_specialize`): it changes from call to call, and a kernel would be compiled again.
"""

# mypy: disable-error-code="no-untyped-def"
# what Triton compiles has its own types: tensors of `tl`, and `tl.constexpr`

import triton
import triton.language as tl


@triton.jit
def _words(base, at, inside, policy: tl.constexpr):
    """Entries 4·at … 4·at + 3 of `base` as words of 64 bits, each of the shape of `at`; 0 where not `inside`.

    16-bit entries fill one word, and the second is the first again; 32-bit entries fill two.
    """
    words = base.to(tl.pointer_type(tl.int64))
    if base.dtype.element_ty.primitive_bitwidth == 16:
        first = tl.load(words + at, mask=inside, other=0, eviction_policy=policy)
        second = first
    else:
        first = tl.load(words + 2 * at, mask=inside, other=0, eviction_policy=policy)
        second = tl.load(words + 2 * at + 1, mask=inside, other=0, eviction_policy=policy)
    return first, second


@triton.jit
def _entries(first, second, dtype: tl.constexpr):
    """The four entries of words."""
    if dtype.primitive_bitwidth == 16:
        a = first.to(tl.int16).to(dtype, bitcast=True)
        b = (first >> 16).to(tl.int16).to(dtype, bitcast=True)
        c = (first >> 32).to(tl.int16).to(dtype, bitcast=True)
        d = (first >> 48).to(tl.int16).to(dtype, bitcast=True)
    else:
        a = first.to(tl.int32).to(dtype, bitcast=True)
        b = (first >> 32).to(tl.int32).to(dtype, bitcast=True)
        c = second.to(tl.int32).to(dtype, bitcast=True)
        d = (second >> 32).to(tl.int32).to(dtype, bitcast=True)
    return a, b, c, d


@triton.jit
def _fetch(values, meta, at, inside):
    """Metadata and words of units; both are read once, so they need not stay in the caches."""
    codes = tl.load(meta + at, mask=inside, other=0, eviction_policy="evict_first")
    first, second = _words(values, at, inside, "evict_first")
    return codes, first, second


@triton.jit
def _placed(first, second, codes):
    """Four columns of 32 bits from the two values of groups and their nibbles."""
    zero = tl.zeros_like(first)
    a = tl.where((codes & 3) == 0, first, zero)
    b = tl.where((codes & 3) == 1, first, tl.where((codes & 12) == 4, second, zero))
    c = tl.where((codes & 3) == 2, first, tl.where((codes & 12) == 8, second, zero))
    d = tl.where((codes & 12) == 12, second, zero)
    return a, b, c, d


@triton.jit
def _columns(first, second, codes, dtype: tl.constexpr):
    """The eight columns of units of W."""
    if dtype.primitive_bitwidth == 16:
        # each value moves 16 bits for each place; two groups of four columns are two words
        shifts = codes.to(tl.int32)
        left = ((first & 0xFFFF) << ((shifts << 4) & 48).to(tl.int64)) | (
            ((first >> 16) & 0xFFFF) << ((shifts << 2) & 48).to(tl.int64)
        )
        right = (((first >> 32) & 0xFFFF) << (shifts & 48).to(tl.int64)) | (
            ((first >> 48) & 0xFFFF) << ((shifts >> 2) & 48).to(tl.int64)
        )
        a, b, c, d = _entries(left, left, dtype)
        e, f, g, h = _entries(right, right, dtype)
    else:
        codes = codes.to(tl.int32)
        v0, v1, v2, v3 = _entries(first, second, dtype)
        a, b, c, d = _placed(v0, v1, codes)
        e, f, g, h = _placed(v2, v3, codes >> 4)
    return a, b, c, d, e, f, g, h


@triton.jit
def _tile(first, second, codes, dtype: tl.constexpr):
    """W `[rows, 8 · units]` from the words and metadata `[rows, units]`."""
    a, b, c, d, e, f, g, h = _columns(first, second, codes, dtype)
    even = tl.join(tl.join(a, e), tl.join(c, g))  # the last dimension is the lowest bit of a column
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), (codes.shape[0], 8 * codes.shape[1]))


@triton.jit
def _add_groups(total, first, second, codes, x0, x1, x2, x3):
    """Add the products of groups: their two values, each times the x at its position."""
    low, middle = (codes & 1) != 0, (codes & 2) != 0  # the first position is 0, 1 or 2
    total += first * tl.where(middle, x2[None, :], tl.where(low, x1[None, :], x0[None, :]))
    low, middle = (codes & 4) != 0, (codes & 8) != 0  # the second one is 1, 2 or 3
    total += second * tl.where(middle, tl.where(low, x3[None, :], x2[None, :]), x1[None, :])
    return total


@triton.jit
def _add_token(total, v0, v1, v2, v3, codes, x, token, tokens, units, unit):
    """Add W · x of one token, float32 `[rows, units]`: what each unit gives to each row."""
    inside = (unit < units) & (token < tokens)
    start = 2 * (token * units + unit)
    dtype: tl.constexpr = x.dtype.element_ty
    first, second = _words(x, start, inside, "evict_last")
    x0, x1, x2, x3 = _entries(first, second, dtype)
    first, second = _words(x, start + 1, inside, "evict_last")
    x4, x5, x6, x7 = _entries(first, second, dtype)
    total = _add_groups(
        total, v0, v1, codes, x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    )
    return _add_groups(
        total, v2, v3, codes >> 4, x4.to(tl.float32), x5.to(tl.float32), x6.to(tl.float32), x7.to(tl.float32)
    )


@triton.jit
def _store_rows(total, token, tokens, out, bias, row, rows, part, HAS_BIAS: tl.constexpr):
    """Add up `[rows, units]` and write one token of one part of `out`, `[parts, tokens, rows]`."""
    y = tl.sum(total, axis=1)
    if HAS_BIAS:
        y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    at = (part * tokens + token) * rows + row
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(row < rows) & (token < tokens))


@triton.jit(do_not_specialize=["tokens"])
def vectors(
    x, values, meta, bias, out, rows, units, tokens,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """`out = x Wᵀ + b` for 1, 2 or 4 tokens (TOKENS) on the plain cores, added up in float32.

    x `[tokens, 8 · units]`; values `[rows, 4 · units]`; meta `[rows, units]`; bias `[rows]`; out
    `[PARTS, tokens, rows]`, one part for each share of the columns (see `finish`). A program computes ROWS rows of one
    part. A pruned weight takes no part, not even where x is inf or NaN.
    """
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = values.dtype.element_ty
    total0 = tl.zeros((ROWS, UNITS), tl.float32)
    total1 = total0
    total2 = total0
    total3 = total0
    unit = part * UNITS + tl.arange(0, UNITS)
    at = tl.max_contiguous(row[:, None] * units + unit[None, :], (1, 2))
    codes, first, second = _fetch(values, meta, at, (row < rows)[:, None] & (unit < units)[None, :])
    for _ in range(STEPS):
        ahead = unit + PARTS * UNITS
        at = tl.max_contiguous(row[:, None] * units + ahead[None, :], (1, 2))
        next_codes, next_first, next_second = _fetch(values, meta, at, (row < rows)[:, None] & (ahead < units)[None, :])
        v0, v1, v2, v3 = _entries(first, second, dtype)
        v0, v1, v2, v3 = v0.to(tl.float32), v1.to(tl.float32), v2.to(tl.float32), v3.to(tl.float32)
        codes = codes.to(tl.int32)
        total0 = _add_token(total0, v0, v1, v2, v3, codes, x, 0, tokens, units, unit)
        if TOKENS > 1:
            total1 = _add_token(total1, v0, v1, v2, v3, codes, x, 1, tokens, units, unit)
        if TOKENS > 2:
            total2 = _add_token(total2, v0, v1, v2, v3, codes, x, 2, tokens, units, unit)
            total3 = _add_token(total3, v0, v1, v2, v3, codes, x, 3, tokens, units, unit)
        codes, first, second, unit = next_codes, next_first, next_second, ahead
    _store_rows(total0, 0, tokens, out, bias, row, rows, part, HAS_BIAS)
    if TOKENS > 1:
        _store_rows(total1, 1, tokens, out, bias, row, rows, part, HAS_BIAS)
    if TOKENS > 2:
        _store_rows(total2, 2, tokens, out, bias, row, rows, part, HAS_BIAS)
        _store_rows(total3, 3, tokens, out, bias, row, rows, part, HAS_BIAS)


@triton.jit(do_not_specialize=["tokens"])
def tiles(
    x, values, meta, bias, out, rows, units, tokens,
    HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr,
    STEPS: tl.constexpr, AS_FLOAT: tl.constexpr,
):  # fmt: skip
    """`out = x Wᵀ + b` for any number of tokens on the tensor cores; arguments as those of `vectors`.

    A program spreads ROWS × 8 · UNITS of W in registers, and multiplies them by TOKENS tokens. Pruned weights are 0.0,
    so NaN and inf in x act as in the dense product. float32 is multiplied as float32, not as TF32, if ROWS < 64.

    Args:
        AS_FLOAT: convert to float32 before the product, for the interpreter: its product of bfloat16 is wrong.
    """
    part = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    dtype: tl.constexpr = values.dtype.element_ty
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    start = part * UNITS
    unit = start + tl.arange(0, UNITS)
    at = tl.max_contiguous(row[:, None] * units + unit[None, :], (1, 2))
    codes, first, second = _fetch(values, meta, at, (row < rows)[:, None] & (unit < units)[None, :])
    for _ in range(STEPS):
        column = 8 * start + tl.arange(0, 8 * UNITS)
        inside = (token < tokens)[None, :] & (column < 8 * units)[:, None]
        xs = tl.load(
            x + token[None, :] * (8 * units) + column[:, None], mask=inside, other=0.0, eviction_policy="evict_last"
        )
        start += PARTS * UNITS
        unit = start + tl.arange(0, UNITS)
        at = tl.max_contiguous(row[:, None] * units + unit[None, :], (1, 2))
        next_codes, next_first, next_second = _fetch(values, meta, at, (row < rows)[:, None] & (unit < units)[None, :])
        w = _tile(first, second, codes, dtype)
        if AS_FLOAT:
            w, xs = w.to(tl.float32), xs.to(tl.float32)
        total = tl.dot(w, xs, total, input_precision="ieee")
        codes, first, second = next_codes, next_first, next_second
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    at = (part * tokens + token)[None, :] * rows + row[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (token < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def finish(
    parts, bias, s, t, out, rows, tokens, rank,
    HAS_BIAS: tl.constexpr, HAS_THIN: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
    PARTS: tl.constexpr, STEPS: tl.constexpr, AS_FLOAT: tl.constexpr,
):  # fmt: skip
    """`out = Σ parts + b + t Sᵀ`: parts float32 `[PARTS, tokens, rows]`, added in their order; out `[tokens, rows]`.

    s `[rows, rank]` and t `[tokens, rank]` are SLoRB's S and `x Xᵀ`; they are only read with HAS_THIN.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < tokens)[:, None] & (row < rows)[None, :]
    at = token[:, None] * rows + row[None, :]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * tokens * rows + at, mask=inside, other=0.0)
    if HAS_THIN:
        for step in range(STEPS):
            r = step * RANK + tl.arange(0, RANK)
            ts = tl.load(
                t + token[:, None] * rank + r[None, :],
                mask=(token < tokens)[:, None] & (r < rank)[None, :], other=0.0,
            )  # fmt: skip
            ss = tl.load(
                s + row[None, :] * rank + r[:, None],
                mask=(row < rows)[None, :] & (r < rank)[:, None], other=0.0,
            )  # fmt: skip
            if AS_FLOAT:
                ts, ss = ts.to(tl.float32), ss.to(tl.float32)
            total = tl.dot(ts, ss, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode(values, meta, dense, rows, units, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """W `[rows, 8 · units]` from values and meta, as `unpack24`. Fewer than 2^31 entries."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    column = tl.program_id(1) * 8 * UNITS + tl.arange(0, 8 * UNITS)
    at = tl.max_contiguous(row[:, None] * units + unit[None, :], (1, 2))
    codes, first, second = _fetch(values, meta, at, (row < rows)[:, None] & (unit < units)[None, :])
    w = _tile(first, second, codes, values.dtype.element_ty)
    inside = (row < rows)[:, None] & (column < 8 * units)[None, :]
    tl.store(dense + row[:, None] * (8 * units) + column[None, :], w, mask=inside)


@triton.jit
def reorder(meta, reordered, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The metadata as CUTLASS reads it: both int16 `[rows, columns]`, rows a multiple of 32, columns of 2.

    The order is that of `reorder_meta` for 16-bit entries in CUTLASS's `host_reorder.h`: rows are interleaved within
    32, the off-diagonal entries of each 2 × 2 block change places, and pairs of columns are stored one after another.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    entry = tl.load(meta + row * columns + column, mask=inside, other=0)
    to_row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    shift = ((to_row % 2 == 0) & (column % 2 == 1)).to(tl.int32) - ((to_row % 2 == 1) & (column % 2 == 0)).to(tl.int32)
    to_row += shift
    to_column = column - shift
    tl.store(reordered + to_column // 2 * rows * 2 + to_row * 2 + to_column % 2, entry, mask=inside)
