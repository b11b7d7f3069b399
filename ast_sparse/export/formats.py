"""The export formats by name.

A compressed format is a codec in its own file, such as `codec24.py`, and an entry at the end of each of the
two tables here. The export, the plug-in that reads checkpoints, the command and the report use them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ast_sparse.export.codec import Codec

FORMAT_HELP = {
    "dense": "zeros written out, any N:M, read by everything",
    "compressed": "2:4 only, values and positions, read by transformers after `import ast_sparse`",
    "compressed-int4": "the same with 4-bit values, scaled by AWQ on --calibration text",
}


@cache
def codecs() -> dict[str, Codec]:
    """The codec of each format that has one; `dense` has none."""
    from ast_sparse.export.codec24 import CODE24  # imports torch: not for --help
    from ast_sparse.export.codec24_int4 import CODE24_INT4

    return {"compressed": CODE24, "compressed-int4": CODE24_INT4}


def codec_of(method: object) -> Codec | None:
    """The codec with the `quant_method` of a config.json; None if it is not one of ours."""
    return next((codec for codec in codecs().values() if codec.method == method), None)
