"""What the compiler makes of the kernel that masks and casts; its results are tested in `interpreted_masked.py`."""

import re
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ast_sparse.kernels.gpu.triton_masked import masked_cast


def test_the_kernel_reads_and_writes_sixteen_bytes_at_a_time_and_rounds_to_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"values": "*fp32", "mask": "*u8", "out": "*bf16", "count": "i32"}
    constants = {"AS_BITS": False, "SIZE": 1024}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(signature))}
    source = ASTSource(
        masked_cast,
        signature | dict.fromkeys(constants, "constexpr"),
        {(masked_cast.arg_names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    # a thread has eight weights: 32 bytes of W, 8 of m, 16 of the result, each once
    assert sorted(re.findall(r"ld\.global\S*?(\.v\d\.b32)", ptx)) == [".v2.b32", ".v4.b32", ".v4.b32"]
    assert re.findall(r"st\.global\S*?(\.v\d\.b32)", ptx) == [".v4.b32"]
    assert len(re.findall(r"cvt\.rn\.bf16\.f32", ptx)) == 8 and "cvt.rz" not in ptx
