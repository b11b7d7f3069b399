import logging

import pytest
import torch

from ast_sparse.errors import UserError
from ast_sparse.kernels import choice
from ast_sparse.kernels.choice import WORTHWHILE, choose_kernels, compiler_fault

CPU = torch.device("cpu")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("No working C++ compiler found.\nMany more lines")

    monkeypatch.setattr(choice, "compile_kernel", lambda function: fails)
    monkeypatch.setattr(choice, "compiler_fault", compiler_fault.__wrapped__)


def test_small_models_compile_nothing_and_large_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(choice, "compiler_fault", lambda device: tried.append(device))
    assert choose_kernels("auto", WORTHWHILE - 1, CPU) == "eager"
    assert choose_kernels("eager", WORTHWHILE, CPU) == "eager"
    assert not tried
    assert choose_kernels("auto", WORTHWHILE, CPU) == "compiled"
    assert choose_kernels("compiled", 8, CPU) == "compiled"
    assert tried == ["cpu"] * 2


def test_a_resumed_run_uses_the_kernels_of_its_checkpoint(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "compiler_fault", lambda device: None)
    assert choose_kernels("auto", 8, CPU, "compiled") == "compiled"
    assert choose_kernels("auto", WORTHWHILE, CPU, "eager") == "eager"
    assert not caplog.records
    assert choose_kernels("eager", 8, CPU, "compiled") == "eager"
    assert "trained with compiled kernels, this run continues with eager ones" in caplog.text


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_kernels_are_eager_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_kernels("auto", WORTHWHILE, CPU, "compiled") == "eager"
    reason = "fails here: RuntimeError: No working C++ compiler found."
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert reason in caplog.records[0].getMessage() and "trained with compiled" in caplog.records[1].getMessage()


@pytest.mark.usefixtures("no_compiler")
def test_compiled_kernels_that_do_not_work_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"sparsity\.kernels='compiled' fails here: .*\. Set auto or eager\.$"):
        choose_kernels("compiled", 8, CPU)


def test_compiling_works_here() -> None:
    assert compiler_fault("cpu") is None
