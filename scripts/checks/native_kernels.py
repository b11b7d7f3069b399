"""Are the products of the C kernels right? Random cases of every level of this CPU against float64, in three ways.

1. As they are. Each tensor ends at a page that the process may not read.
2. Compiled with AddressSanitizer and UndefinedBehaviorSanitizer, by gcc 12 or later. Local variables begin with a
   pattern, so that one which is read before it is set gives a wrong result or stops.
3. A product that is told of one row too many: the sanitizer must stop it, or the second way would prove nothing.

Each level is forced by AST_SPARSE_CPU in a process of its own. `tests/kernels/native/random24.py` makes the cases
(shape, dtype, tokens, strides, bias, not finite, subnormal, large) and says which results are right. NEON: `neon.sh`.

    python scripts/checks/native_kernels.py [--cases 10000] [--seed 0]    # minutes; exit code 1: wrong, 2: not checked
"""

import argparse
import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ast_sparse.kernels.native import library, products24
from ast_sparse.kernels.native.compiling import FLAGS, SOURCES
from ast_sparse.kernels.native.library import kernels, usable_levels
from tests.kernels.native.random24 import random_case, wrong_entries

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = (
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ftrivial-auto-var-init=pattern", "-O1", "-g1",
)  # fmt: skip


def main() -> None:
    """Run the three ways, or one level of one of them in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next ones follow")
    parser.add_argument("--this-level", choices=["guarded", "plain", "too-long"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if compiled := os.environ.get("NATIVE_LIBRARY"):
        library.library_file = lambda: Path(compiled)
    if asked.this_level == "too-long":
        read_one_row_too_many()
    elif asked.this_level:
        sys.exit(check(asked.cases, asked.seed, asked.this_level == "guarded"))
    else:
        sys.exit(run_all(asked.cases, asked.seed))


def run_all(cases: int, seed: int) -> int:
    """The exit code; prints a line for each level and way."""
    if not shutil.which("gcc"):
        print("gcc is needed, with its sanitizers (Debian: apt-get install gcc).", file=sys.stderr)
        return 2
    failed, levels = False, usable_levels()
    if not levels:
        print("This CPU runs no level of the C kernels, so nothing was checked.", file=sys.stderr)
        return 2
    for level in levels:
        failed |= run(level, "guarded", cases, seed).returncode != 0
    with tempfile.TemporaryDirectory() as folder:
        compiled, sources = f"{folder}/native.so", map(str, sorted(SOURCES.glob("*.c")))
        subprocess.run(["gcc", *FLAGS, *SANITIZERS, *sources, "-o", compiled], check=True)
        found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
        sanitized = {
            "NATIVE_LIBRARY": compiled,
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of the process
        }
        print("With AddressSanitizer and UndefinedBehaviorSanitizer:", flush=True)
        for level in levels:
            failed |= run(level, "plain", cases, seed, sanitized).returncode != 0
            stopped = run(level, "too-long", cases, seed, sanitized, quiet=True)
            if stopped.returncode == 0 or "AddressSanitizer: heap-buffer-overflow" not in stopped.stderr:
                print(f"{level}: the sanitizer did not stop a product that reads one row too many.")
                failed = True
    return int(failed)


def run(
    level: str, way: str, cases: int, seed: int, variables: Mapping[str, str] | None = None, quiet: bool = False
) -> subprocess.CompletedProcess[str]:
    """This file again, with AST_SPARSE_CPU set to the level."""
    command = [sys.executable, __file__, "--cases", str(cases), "--seed", str(seed), "--this-level", way]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AST_SPARSE_CPU": level, **(variables or {})}
    return subprocess.run(command, env=environment, text=True, capture_output=quiet)


def check(cases: int, seed: int, guarded: bool) -> int:
    """Whether a result of the level of this process is wrong; prints the first ones."""
    used = kernels()
    assert used is not None
    began, wrong, entries = time.monotonic(), 0, 0
    for number in range(seed, seed + cases):
        case = random_case(number, at_page_end if guarded else torch.clone)
        y = products24.linear(case.x, case.values, case.meta, case.bias, used)
        entries += y.numel()
        if count := wrong_entries(y, case, used.level):
            wrong += 1
            if wrong <= 10:
                print(f"{used.level}, seed {number}: {count} of {y.numel()} wrong. {case}")
    seconds = time.monotonic() - began
    print(f"{used.level}: {wrong} of {cases} cases wrong ({entries} results, {seconds:.0f} s)", flush=True)
    return int(wrong > 0)


def read_one_row_too_many() -> None:
    """A product with values and metadata of 4 rows that says they are 5."""
    used = kernels()
    assert used is not None
    x, values, y = torch.ones(1, 64), torch.ones(4, 32), torch.ones(5)
    meta = torch.full((4, 8), 0x44, dtype=torch.uint8)
    pointers = (values.data_ptr(), meta.data_ptr(), None, y.data_ptr())
    used.linear(used.index, 2, x.data_ptr(), 64, *pointers, 1, 5, 64, 1)


def at_page_end(tensor: Tensor) -> Tensor:
    """A copy that ends at a page that may not be read."""
    page = mmap.PAGESIZE
    size = max(-(-tensor.nbytes // page), 1) * page
    memory = mmap.mmap(-1, size + page)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(first + size), ctypes.c_size_t(page), 0):
        raise OSError("mprotect failed.")
    found = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return found.view(tensor.shape).copy_(tensor)


if __name__ == "__main__":
    main()
