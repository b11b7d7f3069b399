"""Which machines use the functions written for one kind of CPU, and what a user can set."""

import platform
import sys
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ast_sparse.cli.export import main
from ast_sparse.errors import UserError
from ast_sparse.kernels.cpu import setting

FIX = "Set it to auto, plain, amx_bf16, avx512_bf16, avx512, avx2 or neon."
THEIRS: dict[str, Any] = dict(system="linux", library="glibc", processor="x86_64", avx512_f=True)


def is_enabled(monkeypatch: pytest.MonkeyPatch, value: str | None, **machine: Any) -> bool:
    about = {**THEIRS, **machine}
    monkeypatch.setattr(sys, "platform", about["system"])
    monkeypatch.setattr(platform, "libc_ver", lambda: (about["library"], ""))
    monkeypatch.setattr(platform, "machine", lambda: about["processor"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": about["avx512_f"]}, raising=False)
    if value is None:
        monkeypatch.delenv("AST_SPARSE_CPU", raising=False)
    else:
        monkeypatch.setenv("AST_SPARSE_CPU", value)
    return setting.is_enabled.__wrapped__()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("value", "enabled"), [(None, True), ("auto", True), ("plain", False), ("avx2", True)])
def test_the_variable_decides_on_a_supported_machine(
    monkeypatch: pytest.MonkeyPatch, value: str | None, enabled: bool
) -> None:
    assert is_enabled(monkeypatch, value) is enabled


@pytest.mark.parametrize(
    "other", [{"system": "darwin"}, {"library": ""}, {"processor": "aarch64"}, {"avx512_f": False}], ids=str
)
def test_every_other_machine_uses_the_plain_way(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]) -> None:
    assert not is_enabled(monkeypatch, None, **other)
    assert not is_enabled(monkeypatch, "auto", **other)


@pytest.mark.parametrize("value", ["", "fast", "Auto"])
def test_another_value_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    message = f"The environment variable AST_SPARSE_CPU is '{value}'. {FIX}"
    with pytest.raises(UserError) as raised:
        is_enabled(monkeypatch, value)
    assert str(raised.value) == message


def test_a_command_refuses_it_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AST_SPARSE_CPU", "fast")
    result = CliRunner().invoke(main, ["nowhere", "out"])
    assert result.exit_code == 2
    assert result.stderr == f"Error: The environment variable AST_SPARSE_CPU is 'fast'. {FIX}\n"
