"""The loaded C kernels: which level this CPU runs, and torch's threads.

A level is one way to compute, for CPUs with some features (`src/`). The environment variable AST_SPARSE_CPU names one,
or takes the best (`kernels/cpu/setting.py`).
"""

import ctypes
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ast_sparse.errors import UserError
from ast_sparse.kernels.cpu import setting
from ast_sparse.kernels.native.compiling import BuildError, library_file

logger = logging.getLogger(__name__)

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as in frame.h
_ABI = 1
_LARGEST_MAPPED = (32 << 20) - (64 << 10)  # bytes; glibc learns nothing from blocks above 32 MiB
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


@dataclass(frozen=True)
class Kernels:
    """The functions of one level.

    Attributes:
        level: its name.
        index: its number, the first argument of the functions.
        linear: `ast24_linear` of frame.c.
        decode: `ast24_decode` of frame.c.
    """

    level: str
    index: int
    linear: Callable[..., int]
    decode: Callable[..., None]


@cache
def kernels() -> Kernels | None:
    """The kernels that products use in this process; None: the plain way, which is logged if it was not asked for.

    Raises:
        UserError: AST_SPARSE_CPU names a level that this CPU does not have, or that cannot be compiled here.
    """
    requested = setting.requested()
    if requested == "plain":
        return None
    try:
        found = usable_levels()
    except BuildError as error:
        if requested != "auto":
            raise UserError(
                f"{setting.VARIABLE} is {requested}, but the C kernels cannot be had: {error}. Set it to auto or plain."
            ) from error
        logger.warning(f"Compressed products use the plain way: the C kernels cannot be had, because {error}.")
        return None
    if requested == "auto" and not found:
        logger.info("Compressed products use the plain way: there are no C kernels for this CPU.")
        return None
    if requested not in ("auto", *found):
        here = ", ".join(found) or "none"
        raise UserError(f"{setting.VARIABLE} is {requested}, but this CPU has {here}. Set one of them, auto or plain.")
    chosen = of_level(found[0] if requested == "auto" else requested)
    _keep_freed_memory()
    logger.info(f"Compressed products use the C kernels {chosen.level}.")
    return chosen


def _keep_freed_memory() -> None:
    """Have glibc take blocks below 32 MiB from its heap, and keep up to 64 MiB that is free at the heap's end.

    It does so once a block of that size was freed. PyTorch's long products free such blocks, these kernels have none.
    Without one, glibc may give the activations of each layer back to Linux, and every element-wise operation waits for
    new pages. Where the user has set glibc's thresholds, or another allocator is in use, nothing changes.
    """
    if sys.platform == "linux":
        c = ctypes.CDLL(None)
        c.malloc.argtypes, c.malloc.restype, c.free.argtypes = [ctypes.c_size_t], _POINTER, [_POINTER]
        c.free(c.malloc(_LARGEST_MAPPED))  # no page of it is touched; without memory it is NULL, which free accepts


def usable_levels() -> list[str]:
    """Names of the levels that this CPU runs, best first.

    Raises:
        BuildError: there is no library.
    """
    library = _library()
    return [name for index, name in enumerate(_names(library)) if library.ast24_usable(index)]


def of_level(name: str) -> Kernels:
    """The kernels of one of `usable_levels`."""
    library = _library()
    index = _names(library).index(name)
    library.ast24_usable(index)  # the question also asks Linux for the tiles of AMX
    return Kernels(name, index, library.ast24_linear, library.ast24_decode)


def _names(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while name := library.ast24_name(len(names)):
        names.append(name.decode())
    return names


@cache
def _library() -> ctypes.CDLL:
    file = library_file()
    try:
        library = ctypes.CDLL(str(file))
        if library.ast24_abi() != _ABI:
            raise BuildError(f"{file} is of another version")
    except (OSError, AttributeError) as error:
        raise BuildError(f"{file} cannot be loaded ({error}); delete it, and it will be compiled again") from error
    library.ast24_name.argtypes, library.ast24_name.restype = [_INT], ctypes.c_char_p
    library.ast24_usable.argtypes = [_INT]
    library.ast24_openmp.argtypes, library.ast24_openmp.restype = [_POINTER] * 3, None
    library.ast24_linear.argtypes = [_INT, _INT, _POINTER, _LONG, *[_POINTER] * 4, *[_LONG] * 3, _INT]
    library.ast24_decode.argtypes = [_INT, _INT, *[_POINTER] * 3, *[_LONG] * 2, _INT]
    library.ast24_decode.restype = None
    if functions := openmp_of_torch():
        library.ast24_openmp(*functions)
    return library


def openmp_of_torch() -> list[int] | None:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads as torch itself calls them.

    The OpenMP libraries of GCC, LLVM and Intel have these functions on Linux. They are looked up as the loader does for
    libtorch: first in what is loaded for everyone, for example by LD_PRELOAD, then in what libtorch brings. None: the
    kernels run in one thread.
    """
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    for file in (None, str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")):
        try:
            handle = ctypes.CDLL(file, mode=getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_LAZY", 0))
            return [ctypes.cast(getattr(handle, name), _POINTER).value or 0 for name in names]
        except (OSError, AttributeError):
            continue
    return None
