"""The compressed format of 2:4 weights; `kernels/code24.py` describes the code."""

from ast_sparse.export.codec import Codec
from ast_sparse.kernels.code24 import check_meta, pack24, unpack24
from ast_sparse.kernels.linear24 import linear24
from ast_sparse.sparsity.masks import Pattern

CODE24 = Codec(
    method="ast_sparse_24",
    format_version=1,
    pattern=Pattern(2, 4),
    multiple=8,
    columns_per_byte=8,
    encode=pack24,
    decode=unpack24,
    check_meta=check_meta,
    product=linear24,
)
