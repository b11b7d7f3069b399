"""Which functions are used on a CPU: the environment variable AST_SPARSE_CPU decides.

- `auto`, the default: they are used on Linux with glibc, on an x86-64 CPU with AVX-512, for which they were written
  and measured. Every other machine uses the plain way.
- `plain`: the plain way everywhere.
- the name of a level of `kernels/native/`: its C kernels multiply compressed weights, and no better ones; an error if
  this CPU cannot run them. The rest is as with `auto`.

The plain way calls only PyTorch, and is next to each call of these functions: `kernels/products.py`,
`kernels/fast_forward.py`, `kernels/code24.py`. Memory (`heap.py`) and codes (`words.py`) do not change results.
Products (`onednn.py`) are equal to the plain ones within rounding. Checkpoints do not store the choice: a run that
continues with the other one is equal to the uninterrupted run within rounding, not to the bit.
"""

import os
import platform
import sys
from functools import cache
from typing import Any

from ast_sparse.errors import UserError, shown

VARIABLE = "AST_SPARSE_CPU"
LEVELS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "neon")  # of `kernels/native/`


@cache
def is_enabled() -> bool:
    """Whether the functions of this folder are used; decided once per process.

    Raises:
        UserError: the variable has a value that is not known.
    """
    return requested() != "plain" and _is_their_machine()


def requested() -> str:
    """The value of the environment variable.

    Raises:
        UserError: it is not known.
    """
    value = os.environ.get(VARIABLE, "auto")
    if value not in ("auto", "plain", *LEVELS):
        known = f"auto, plain, {', '.join(LEVELS[:-1])} or {LEVELS[-1]}"
        raise UserError(f"The environment variable {VARIABLE} is {shown(value)}. Set it to {known}.")
    return value


def _is_their_machine() -> bool:
    its_system = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    return its_system and platform.machine() == "x86_64" and bool(capabilities().get("avx512_f"))


def capabilities() -> dict[str, Any]:
    """The features of this CPU under torch's names; empty if torch does not report them."""
    import torch  # only here, because commands check the variable before they load torch

    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found
