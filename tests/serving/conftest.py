"""vLLM's stand-in for one test."""

import sys
from collections.abc import Iterator

import pytest

from tests.serving.vllm_stand_in import ROOTS, modules


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules called `vllm` that the plug-in can import."""
    yield from _stand_in(monkeypatch, 1)


@pytest.fixture
def vllm_in_two_stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same in a process that has one of two pipeline-parallel parts of the model."""
    yield from _stand_in(monkeypatch, 2)


def _stand_in(monkeypatch: pytest.MonkeyPatch, stages: int) -> Iterator[None]:
    for name, module in modules(stages).items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    for name in [each for each in sys.modules if each.startswith(ROOTS)]:
        monkeypatch.delitem(sys.modules, name)
    import ast_sparse.serving as room

    for name in ("vllm_config", "vllm_linear"):
        room.__dict__.pop(name, None)
