"""Which level a process uses, what a user reads if it cannot be had, and whose threads it runs in."""

import ctypes
import logging
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ast_sparse.errors import UserError
from ast_sparse.kernels.code24 import pack24
from ast_sparse.kernels.linear24 import linear24
from ast_sparse.kernels.native import library, products24
from ast_sparse.kernels.native.compiling import BuildError


def kernels(monkeypatch: pytest.MonkeyPatch, value: str) -> library.Kernels | None:
    monkeypatch.setenv("AST_SPARSE_CPU", value)
    return library.kernels.__wrapped__()  # type: ignore[no-any-return]


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BuildError("no C compiler (cc, gcc, clang) was found")

    monkeypatch.setattr(library, "_library", fail)


def test_auto_takes_the_best_level_and_a_name_takes_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = library.usable_levels()
    chosen = kernels(monkeypatch, "auto")
    assert (chosen and chosen.level) == next(iter(levels), None)
    for level in levels:
        named = kernels(monkeypatch, level)
        assert named is not None and named.level == level


def test_the_levels_of_this_cpu_are_those_whose_features_linux_lists() -> None:
    """A level that is missing here would take its tests with it."""
    if sys.platform != "linux":
        return
    flags = set(re.findall(r"^(?:flags|Features)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split())
    avx512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"}
    bf16 = avx512 | {"avx512vbmi", "avx512_vbmi2", "avx512_bf16"}
    needs = {
        "amx_bf16": bf16 | {"amx_tile", "amx_bf16"}, "avx512_bf16": bf16, "avx512": avx512,
        "avx2": {"avx2", "fma", "f16c"}, "neon": {"asimd"},
    }  # fmt: skip
    expected = [level for level, features in needs.items() if features <= flags]
    compiled = library._names(library._library())  # an old assembler does not know AMX
    if "amx_bf16" not in compiled or not linux_gives_the_tiles():
        expected = [level for level in expected if level != "amx_bf16"]
    assert library.usable_levels() == expected


def linux_gives_the_tiles() -> bool:
    """Whether a process may use the tiles of AMX, which some virtual machines list and refuse."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return platform.machine() == "x86_64" and not ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)


def test_plain_takes_none_and_does_not_look_for_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_library", None)
    assert kernels(monkeypatch, "plain") is None


def test_a_level_that_the_cpu_lacks_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "usable_levels", lambda: ["avx2"])
    message = "AST_SPARSE_CPU is neon, but this CPU has avx2. Set one of them, auto or plain."
    with pytest.raises(UserError) as raised:
        kernels(monkeypatch, "neon")
    assert str(raised.value) == message


def test_without_a_library_auto_says_so_once_and_goes_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_library(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert kernels(monkeypatch, "auto") is None
    reason = "the C kernels cannot be had, because no C compiler (cc, gcc, clang) was found."
    assert [each.getMessage() for each in caplog.records] == [f"Compressed products use the plain way: {reason}"]


def test_without_a_library_a_named_level_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)
    with pytest.raises(UserError, match=r"^AST_SPARSE_CPU is avx2, but the C kernels cannot be had: no C compiler"):
        kernels(monkeypatch, "avx2")


def test_a_file_that_is_no_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "library_file", lambda: broken)
    with pytest.raises(BuildError, match=r"broken\.so cannot be loaded \(.*\); delete it"):
        library._library.__wrapped__()


ONE_TEAM = """
import torch
from ast_sparse.kernels.native import library
from ast_sparse.kernels.native.products24 import linear
torch.set_num_threads(3)
torch.randn(400, 400) @ torch.randn(400, 400)  # starts torch's own team
before = len(open('/proc/self/maps').read())
def loaded():
    return sorted({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/')[-1]})
teams, threads = loaded(), __import__('os').listdir('/proc/self/task')
values = torch.randn(1000, 200); meta = torch.full((1000, 50), 0x44, dtype=torch.uint8)
for level in library.usable_levels():
    linear(torch.randn(4, 400), values, meta, None, library.of_level(level))
assert library.openmp_of_torch()
assert loaded() == teams and len(teams) == 1, (teams, loaded())
assert __import__('os').listdir('/proc/self/task') == threads
"""


def test_the_threads_are_those_of_torch() -> None:
    done = subprocess.run([sys.executable, "-c", ONE_TEAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FREED_MEMORY = """
import ctypes, torch
from ast_sparse.kernels.native.library import kernels

libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "arena ordblks smblks hblks hblkhd a b c d keepcost".split()]
libc.mallinfo.restype, libc.malloc.restype, libc.malloc.argtypes = Info, ctypes.c_void_p, [ctypes.c_size_t]

def is_mapped(size):
    before = libc.mallinfo().hblks
    assert libc.malloc(size)
    return libc.mallinfo().hblks > before

assert is_mapped(30 << 20), "it is kept anyway"
assert kernels()
assert not is_mapped(30 << 20), "freed buffers go back to Linux"
assert is_mapped(40 << 20)
"""


def test_glibc_keeps_the_memory_of_freed_activations() -> None:
    others = ("AST_SPARSE_CPU", "LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_")  # another way, allocator or threshold
    env = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    done = subprocess.run([sys.executable, "-c", FREED_MEMORY], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tokens", [1, 3, 70, 131])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bits_do_not_depend_on_the_threads_or_the_other_tokens(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.zeros(300, 400, dtype=dtype)
    weight.view(300, 100, 4)[..., 1:3] = torch.randn(300, 100, 2, generator=generator).to(dtype)
    values, meta = pack24(weight)
    x = torch.randn(tokens, 400, generator=generator).to(dtype)
    before = torch.get_num_threads()
    for level in library.usable_levels():
        used, found = library.of_level(level), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                found.append(products24.linear(x, values, meta, None, used))
            finally:
                torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        if tokens == 70:  # another width of the last block
            assert torch.equal(products24.linear(x[:20], values, meta, None, used), found[0][:20])
        if tokens == 131:  # the last ones are not a product of their own
            assert torch.equal(products24.linear(x[100:], values, meta, None, used), found[0][100:])
        if tokens == 3:
            assert torch.equal(products24.linear(x[:2], values, meta, None, used), found[0][:2])


def test_several_python_threads_may_multiply_at_once() -> None:
    weight = torch.zeros(256, 1024)
    weight.view(256, 256, 4)[..., 1:3] = torch.randn(256, 256, 2)
    values, meta = pack24(weight)
    used = library.of_level(library.usable_levels()[0])
    inputs = [torch.randn(tokens, 1024) for tokens in (1, 2, 5, 70) for _ in range(5)]
    expected = [products24.linear(x, values, meta, None, used) for x in inputs]

    def product(x: torch.Tensor) -> torch.Tensor:
        torch.set_num_threads(2)  # of the teams that this thread starts
        return products24.linear(x, values, meta, None, used)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(product, inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_dense_products_are_used_above_the_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(48, 64)
    weight.view(48, 16, 4)[..., 2:] = torch.randn(48, 16, 2)
    values, meta = pack24(weight)
    x, bias = torch.randn(2, 40, 64), torch.randn(48)
    monkeypatch.setattr(products24, "_BLOCK", 64 * 20)  # three blocks of rows
    for win, exact in ((False, True), (True, False)):
        monkeypatch.setattr(products24, "_kernels_win", lambda *_, win=win: win)
        found = linear24(x, values, meta, bias)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))
        used = products24.kernels()
        assert used is None or torch.equal(found, products24.linear(x, values, meta, bias, used)) is not exact


def test_the_two_ways_are_compared_once_for_a_shape_and_a_power_of_two_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, meta = pack24(torch.zeros(32, 64))
    used, measured = library.of_level(library.usable_levels()[0]), []
    seconds = iter([3.0, 2.0, 2.0, 3.0, 1.0, 1.0])  # by blocks, by the kernels
    by_kernels = products24._by_kernels
    monkeypatch.setattr(products24, "_least_seconds", lambda *calls: [(call(), next(seconds))[1] for call in calls])
    monkeypatch.setattr(products24, "_faster", {})
    monkeypatch.setattr(products24, "_by_kernels", lambda *args: (measured.append(len(args[1])), by_kernels(*args))[1])
    for tokens, wins in ((17, True), (32, True), (33, False), (64, False), (500, False), (4000, False)):
        assert products24._kernels_win(used, torch.zeros(tokens, 64), values, meta, 1) is wins
    assert measured == [32, 64, 512]  # PyTorch's product of a few tokens says nothing about many


def test_the_two_ways_take_turns_and_the_least_time_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    times = iter([9.0, 9.0, 3.0, 2.0, *[5.0] * 10])
    monkeypatch.setattr(products24, "_seconds", lambda call: (call(), next(times))[1])
    assert products24._least_seconds(lambda: calls.append("a"), lambda: calls.append("b")) == [3.0, 2.0]
    assert calls == ["a", "b"] * 7


def test_what_the_kernels_do_not_serve_goes_the_plain_way_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, meta = pack24(torch.zeros(4, 16, dtype=torch.bfloat16))
    x, bias = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)
    assert products24.takes(x, values, meta, bias) is (products24.kernels() is not None)

    def never() -> None:
        raise AssertionError("the kernels are asked for")

    monkeypatch.setattr(products24, "kernels", never)
    assert not products24.takes(x.float(), values, meta)
    assert not products24.takes(x[:, :8], values, meta)
    assert not products24.takes(x[0, 0], values, meta)
    assert not products24.takes(x[:0], values, meta)
    assert not products24.takes(x, values[:0], meta[:0])
    assert not products24.takes(x, values, meta.t().contiguous().t())
    assert not products24.takes(x, values, meta.to(torch.int8))
    assert not products24.takes(x.double(), values.double(), meta)
    assert not products24.takes(x.to_sparse(), values, meta)
    assert not products24.takes(x, values, meta, bias.float())
    assert not products24.takes(x, values, meta, bias[:1])
    tensors = {"x": x, "values": values, "meta": meta, "bias": bias}
    for name, tensor in tensors.items():
        assert not products24.takes(**{**tensors, name: tensor.to("meta")})
    with torch.autocast("cpu"):
        assert not products24.takes(x, values, meta)
