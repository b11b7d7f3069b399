"""The Triton kernels: their results in Triton's interpreter, and what the compiler makes of them, without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ast_sparse.kernels.gpu import triton24

NUMBERS = {"rows": "i32", "units": "i32", "tokens": "i32", "rank": "i32", "columns": "i32"}


def test_all_kernels_are_right_in_the_interpreter() -> None:
    """In a process of its own: Triton decides when it is imported whether it compiles or interprets."""
    tests = [str(path) for path in sorted(Path(__file__).parent.glob("interpreted*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def compiled(
    kernel: Any, dtype: str, capability: int, warps: int, odd: tuple[str, ...] = ("tokens",), **constants: Any
) -> Any:
    """A kernel compiled for a GPU that need not be here; what is not `odd` is a multiple of 16."""
    types = {"meta": "*i16" if kernel is triton24.reorder else "*u8", "reordered": "*i16", "parts": "*fp32"}
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else NUMBERS.get(name) or types.get(name, f"*{dtype}") for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name not in (*constants, *odd)}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def registers_and_stack(binary: bytes, folder: Path) -> tuple[int, int]:
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


PRODUCT = dict(HAS_BIAS=True, PARTS=1, STEPS=8)
TILE = dict(**PRODUCT, AS_FLOAT=False, TOKENS=16)
FINISH = dict(HAS_BIAS=True, HAS_THIN=True, TOKENS=16, ROWS=64, RANK=32, PARTS=2, STEPS=8, AS_FLOAT=False)


@pytest.mark.parametrize(
    "name, dtype, capability, warps, constants, registers",
    [
        ("vectors", "bf16", 90, 4, dict(**PRODUCT, TOKENS=1, ROWS=8, UNITS=64), 64),
        ("vectors", "fp16", 80, 8, dict(**PRODUCT, TOKENS=1, ROWS=16, UNITS=128), 96),
        ("vectors", "fp32", 90, 4, dict(**PRODUCT, TOKENS=2, ROWS=8, UNITS=64), 128),
        ("vectors", "bf16", 90, 4, dict(**PRODUCT, TOKENS=4, ROWS=8, UNITS=64), 128),
        ("tiles", "bf16", 90, 4, dict(**TILE, ROWS=64, UNITS=16), 128),
        ("tiles", "fp16", 80, 4, dict(**TILE, ROWS=64, UNITS=8), 128),
        ("tiles", "fp32", 90, 4, dict(**TILE, ROWS=32, UNITS=16), 255),
        ("tiles", "fp32", 100, 4, dict(**TILE, ROWS=32, UNITS=8), 255),
        ("finish", "bf16", 90, 4, FINISH, 255),
        ("finish", "fp32", 100, 4, FINISH, 255),
        ("decode", "bf16", 90, 4, dict(ROWS=16, UNITS=16), 64),
        ("reorder", "i16", 90, 4, dict(ROWS=32, COLUMNS=32), 64),
    ],
)  # fmt: skip
def test_kernels_compile_without_spilling_registers(
    name: str, dtype: str, capability: int, warps: int, constants: dict[str, Any], registers: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compiled(getattr(triton24, name), dtype, capability, warps, **constants)
    used, stack = registers_and_stack(kernel.asm["cubin"], tmp_path)
    assert used <= registers and stack == 0
    assert "tf32" not in kernel.asm["ptx"]
    if name in ("vectors", "tiles") and dtype != "fp32":
        # a thread reads 16 bytes of values at a time, and the two bytes of metadata that belong to them
        loads = re.findall(r"ld\.global\.L1::evict_first\S*?((?:\.v\d)?\.b\d+)\s", kernel.asm["ptx"])
        assert set(loads) == {".v2.b64", ".b16"}
    if name == "vectors" and dtype != "fp32":
        loop = kernel.asm["ttgir"].split("scf.for", 1)[1].split("scf.yield", 1)[0]
        assert "convert_layout" not in loop  # x goes straight into registers


@pytest.mark.parametrize("name, constants", [("vectors", dict(**PRODUCT, TOKENS=1)), ("tiles", TILE)])
def test_rows_that_do_not_start_at_sixteen_bytes_are_read_by_smaller_words(
    name: str, constants: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with 1032 columns, or any number that is not a multiple of 128."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compiled(getattr(triton24, name), "bf16", 90, 4, ("tokens", "units"), **constants, ROWS=16, UNITS=64)
    loads = re.findall(r"(?:ld\.global|cp\.async)\S*", kernel.asm["ptx"])
    values = [load for load in loads if "evict_first" in load]
    assert {load.rpartition(".")[2] for load in values} == {"b64", "b8"} and not any(".v" in load for load in values)


@pytest.mark.parametrize("capability", [89, 100, 120])
def test_the_kernel_for_tensor_cores_compiles_for_other_generations(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compiled(triton24.tiles, "bf16", capability, 4, **TILE, ROWS=64, UNITS=16)
    assert registers_and_stack(kernel.asm["cubin"], tmp_path)[1] == 0


@pytest.mark.parametrize("name", ["vectors", "tiles", "finish"])
def test_another_number_of_tokens_compiles_nothing(name: str) -> None:
    kernel = getattr(triton24, name)
    assert [each.name for each in kernel.params if each.do_not_specialize] == ["tokens"]


@pytest.mark.parametrize(
    "name, constants",
    [
        ("vectors", dict(**PRODUCT, TOKENS=1, ROWS=8, UNITS=64, rows=1, units=1)),
        ("tiles", dict(**TILE, ROWS=64, UNITS=16, rows=1, units=1)),
        ("finish", dict(**FINISH, rows=1, rank=1)),
        ("finish", dict(**FINISH | dict(HAS_THIN=False, STEPS=0))),
        ("decode", dict(ROWS=16, UNITS=16, rows=1, units=1)),
    ],
)
def test_kernels_compile_for_sizes_of_one_which_triton_makes_constants(
    name: str, constants: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compiled(getattr(triton24, name), "bf16", 90, 4, **constants)
    assert registers_and_stack(kernel.asm["cubin"], tmp_path)[1] == 0
