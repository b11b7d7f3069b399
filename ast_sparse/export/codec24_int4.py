"""The compressed format of 2:4 weights with 4-bit values; `kernels/int4.py` describes the code."""

from ast_sparse.export.codec import Codec
from ast_sparse.kernels.code24 import check_meta
from ast_sparse.kernels.int4 import (
    GROUP,
    linear24_int4,
    pack24_int4,
    round_to_grid,
    round_with_feedback,
    unpack24_int4,
)
from ast_sparse.sparsity.masks import Pattern

CODE24_INT4 = Codec(
    method="ast_sparse_24_int4",
    format_version=1,
    pattern=Pattern(2, 4),
    multiple=8,
    columns_per_byte=8,
    encode=pack24_int4,
    decode=unpack24_int4,
    check_meta=check_meta,
    product=linear24_int4,
    value_bits=4,
    scale_columns=GROUP,
    round=round_to_grid,
    round_with_feedback=round_with_feedback,
)
