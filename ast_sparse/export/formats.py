"""The export formats by name.

A compressed format is a codec in its own file, such as `codec24.py`, and an entry at the end of each of the two tables
here, and of `CALIBRATED` if it rounds. The export, the plug-in that reads checkpoints, the command and the report use
them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from ast_sparse.errors import UserError, shown

if TYPE_CHECKING:
    from ast_sparse.export.codec import Codec

FORMAT_HELP = {
    "dense": "zeros written out, any N:M, read by everything",
    "compressed": "2:4 only, values and positions, read by transformers after `import ast_sparse`, and by vLLM",
    "compressed-int4": "the same with 4-bit values, scaled by AWQ on --calibration text",
}
CALIBRATED = ("compressed-int4",)  # whose codec rounds weights, by calibration text if there is some


@cache
def codecs() -> dict[str, Codec]:
    """The codec of each format that has one; `dense` has none."""
    from ast_sparse.export.codec24 import CODE24  # imports torch: not for --help
    from ast_sparse.export.codec24_int4 import CODE24_INT4

    return {"compressed": CODE24, "compressed-int4": CODE24_INT4}


def codec_of(method: object) -> Codec | None:
    """The codec with the `quant_method` of a config.json; None if it is not one of ours."""
    return next((codec for codec in codecs().values() if codec.method == method), None)


def check_format(method: Any, version: Any, modules: Any) -> Codec:
    """The codec of a checkpoint's `quantization_config`, from its keys quant_method, format_version and modules.

    Raises:
        UserError: the method is not one of ours, the version is newer than its codec's, or the modules are not names.
    """
    codec = codec_of(method)
    if codec is None:
        known = " or ".join(repr(each.method) for each in codecs().values())
        raise UserError(f"quant_method={shown(method)} is not a code of ast_sparse. Use {known}.")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UserError(f"{method}: format_version={shown(version)} is not a version. Restore config.json.")
    if version > codec.format_version:
        raise UserError(
            f"The checkpoint has {method} format_version {version}, newer than {codec.format_version}, the latest "
            "this ast_sparse reads. Update ast_sparse."
        )
    if not isinstance(modules or [], list) or not all(isinstance(name, str) for name in modules or []):
        raise UserError(f"{method}: modules={shown(modules)} is not a list of names. Restore config.json.")
    return codec
