"""Cases for `neon.c`, and whether its results are right; called by `neon.sh`.

python scripts/checks/neon.py write|compare FILE CASES FIRST_SEED
"""

import struct
import sys
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ast_sparse.kernels.code24 import same_bits
from tests.kernels.native.random24 import DTYPES, random_case, slow_dense, wrong_entries


def main() -> None:
    """Write the cases, or compare the results and exit with code 1 if one is wrong."""
    way, file, cases, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    with file.open("wb" if way == "write" else "rb") as opened:
        seeds = range(first, first + cases)
        if way == "write":
            for seed in seeds:
                write(opened, seed)
        else:
            wrong = [seed for seed in seeds if is_wrong(opened, seed)]
            print(f"neon: {len(wrong)} of {cases} cases wrong" + (f", seeds {wrong[:10]}" if wrong else ""))
            sys.exit(1 if wrong or opened.read(1) else 0)


def write(file: BinaryIO, seed: int) -> None:
    """One case, as the `struct` of neon.c and its tensors; rows of x have a gap of 0 to 3 entries."""
    case = random_case(seed)
    x = case.x.reshape(-1, case.x.shape[-1])
    (tokens, columns), rows, gap = x.shape, len(case.values), seed % 4
    spaced = torch.full((tokens, columns + gap), torch.nan, dtype=x.dtype)
    spaced[:, :columns] = x
    sizes = (DTYPES.index(x.dtype), x.element_size(), tokens, rows, columns, columns + gap, case.bias is not None)
    file.write(struct.pack("<7q", *sizes))
    for tensor in (spaced.flatten()[: spaced.numel() - gap], case.values, case.meta, case.bias):
        if tensor is not None:
            file.write(bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()))


def is_wrong(file: BinaryIO, seed: int) -> bool:
    """Whether the next results, of the case of this seed, are not right; decoded weights must be equal to the bit."""
    case = random_case(seed)
    y = read(file, (*case.x.shape[:-1], len(case.values)), case.x.dtype)
    dense = read(file, (len(case.values), case.x.shape[-1]), case.x.dtype)
    return bool(wrong_entries(y, case, "neon")) or not same_bits(dense, slow_dense(case.values, case.meta))


def read(file: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The next tensor."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(bytearray(file.read(size)), dtype=dtype).view(shape)


if __name__ == "__main__":
    main()
