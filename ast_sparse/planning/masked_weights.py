"""`sparsity.masked_weights: auto` and `sparsity.semi_structured: auto` decided by the memory of a device."""

from collections.abc import Callable
from dataclasses import replace

from ast_sparse.planning.memory import Memory
from ast_sparse.planning.setup import Setup

_KEPT = "a 16-bit copy of each is kept"
_MADE = "made again whenever they are needed"


def settle_masked_weights(memory: Callable[[Setup], Memory], setup: Setup, limit: float) -> tuple[Setup, str | None]:
    """The setup with `kept` or `made` instead of `auto`, and a line that says which and why.

    Copies are kept if a device has enough memory for them, and always on a CPU. Without enough memory, semi-structured
    products that were left to `auto` are given up first; those that were asked for need the copies.

    Args:
        memory: the memory that one device needs with a setup.
        limit: bytes that may be used.

    Returns:
        The setup as it is, and None, if the setting has no effect: products in float32, or a sharded, offloaded or
        dense forward pass, or CUDA graphs.
    """
    if not setup.has_masked_weights:
        return setup, None
    asked = f"sparsity.masked_weights={setup.masked_weights}"
    kept, made = (replace(setup, masked_weights=choice) for choice in ("kept", "made"))
    if setup.masked_weights == "made":
        return made, f"masked weights: {_MADE} ({asked})"
    also = ""
    if setup.semi_structured == "auto" and not setup.on_cpu and memory(kept).total > limit:
        kept, also = replace(kept, semi_structured="off"), "; no memory for semi-structured products"
    if setup.masked_weights == "kept":
        return kept, f"masked weights: {_KEPT} ({asked}{also})"
    if setup.semi_structured == "on":
        return kept, f"masked weights: {_KEPT} ({asked}: sparsity.semi_structured=on needs it)"
    if setup.on_cpu:
        return kept, f"masked weights: {_KEPT} ({asked}: always on a CPU)"
    if made.holds_masked_weights:
        return kept, f"masked weights: {_KEPT} ({asked}: the compiled graphs would hold what they make{also})"
    if memory(kept).total <= limit:
        return kept, f"masked weights: {_KEPT} ({asked}: the memory is enough{also})"
    if memory(made).total <= limit:
        return made, f"masked weights: {_MADE} ({asked}: the memory is not enough for copies)"
    return made, f"masked weights: {_MADE} ({asked}: the memory is not enough in either case)"
