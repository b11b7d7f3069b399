"""The kernel of the distillation loss without a GPU: what its compiler makes of it, and who computes the loss instead.

Its results are tested in `interpreted_loss.py`.
"""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ast_sparse.kernels.gpu import loss_rows, triton_loss
from tests.kernels.gpu.test_triton24 import registers_and_stack

ALL = dict(HAS_CE=True, HAS_TEACHER=True, IS_ONE=False, HAS_CAP=True, HAS_TEACHER_CAP=True, WITH_GRADIENT=True)
ONE = dict(HAS_CE=True, HAS_TEACHER=True, IS_ONE=True, HAS_CAP=False, HAS_TEACHER_CAP=False, WITH_GRADIENT=True)
FEW = dict(HAS_CE=True, HAS_TEACHER=False, IS_ONE=False, HAS_CAP=False, HAS_TEACHER_CAP=False, WITH_GRADIENT=False)


def compiled(dtype: str, capability: int, is_aligned: bool, **constants: Any) -> Any:
    """The kernel compiled for a GPU that need not be here."""
    names, types = triton_loss.distil_rows.arg_names, {"labels": "*i64", "losses": "*fp32"}
    pointers, numbers = (
        ("student", "teacher", "grads"),
        ("student_stride", "teacher_stride", "grads_stride", "width", "common"),
    )
    types |= dict.fromkeys(pointers, f"*{dtype}") | dict.fromkeys(numbers, "i32")
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *numbers) if is_aligned}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(triton_loss.distil_rows, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})


@pytest.mark.parametrize(
    "kind, dtype, capability, is_aligned, registers, constants",
    [
        ("kl", "bf16", 90, True, 128, ONE),
        ("reverse_kl", "fp32", 80, True, 255, ALL),
        ("tinybert", "fp16", 100, False, 255, ALL),
        ("kl", "bf16", 120, True, 128, FEW),
    ],
)
def test_the_kernel_compiles_without_spilling_registers(
    kind: str, dtype: str, capability: int, is_aligned: bool, registers: int, constants: dict[str, Any],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel = compiled(dtype, capability, is_aligned, **constants, KIND=kind, BLOCK=4096, STEPS=8)
    used, stack = registers_and_stack(kernel.asm["cubin"], tmp_path)
    assert used <= registers and stack == 0
    if is_aligned:  # 16 bytes at a time
        assert "v4" in "".join(re.findall(r"ld\.global\S*", kernel.asm["ptx"]))


def test_a_slice_that_starts_elsewhere_compiles_nothing() -> None:
    assert [each.name for each in triton_loss.distil_rows.params if each.do_not_specialize] == ["labels", "losses"]


def test_a_kernel_that_fails_is_named_in_one_line_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # but the compiled kernel refuses CPU tensors
    loss_rows.fault.cache_clear()
    try:
        assert not any(loss_rows.takes(torch.randn(1, 8), None, torch.tensor([1])) for _ in range(2))
        assert loss_rows.fault(torch.device("cpu"))
    finally:
        loss_rows.fault.cache_clear()
    [record] = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.message
    assert record.message.startswith("The distillation loss takes PyTorch's operations on cpu: ")


def test_a_kernel_with_wrong_results_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the kernel would be used on the CPU
    monkeypatch.setattr(loss_rows, "loss_rows", lambda student, teacher, labels, losses, grads, **_: losses.zero_())
    loss_rows.fault.cache_clear()
    try:
        assert not loss_rows.takes(torch.randn(1, 8), None, torch.tensor([1]))
        assert loss_rows.fault(torch.device("cpu")) == "the kernel returns wrong results."
    finally:
        loss_rows.fault.cache_clear()
    [record] = caplog.records
    assert record.levelno == logging.WARNING and record.message.endswith("the kernel returns wrong results.")
