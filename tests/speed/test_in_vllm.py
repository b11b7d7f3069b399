"""The engine of vLLM, with a stand-in for vLLM: how its steps are timed and collected."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ast_sparse.errors import UserError
from ast_sparse.speed.cases import Case
from ast_sparse.speed.in_vllm import VllmEngine

CASE = Case(prompt=5, new=4, batch=2)


class Engine:
    """Adds the same token to every request at each step; every third step of a `lazy` engine does nothing."""

    lazy = False

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.steps = 0

    def add_request(self, name: str, prompt: dict[str, list[int]], params: Any) -> None:
        assert params.temperature == 0.0 and params.ignore_eos and len(prompt["prompt_token_ids"]) == 5
        self.requests[name] = SimpleNamespace(tokens=[], left=params.max_tokens)

    def step(self) -> list[Any]:
        self.steps += 1
        if self.lazy and self.steps % 3 == 0:
            return []
        found = []
        for name, request in list(self.requests.items()):
            request.tokens.append(self.steps)
            if len(request.tokens) == request.left:
                del self.requests[name]
            found.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=request.tokens)]))
        return found

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            self.requests.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put the stand-in in place; the settings it was made with."""
    module, given = ModuleType("vllm"), {}

    def make(**settings: Any) -> SimpleNamespace:
        given.update(settings)
        return SimpleNamespace(llm_engine=Engine())

    module.LLM, module.SamplingParams = make, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return given


def engine(cases: list[Case]) -> VllmEngine:
    return VllmEngine(Path("model"), "float32", 11, cases, 10**9, eager=True)


def test_it_is_large_enough_for_every_case_and_keeps_no_prefixes(settings: dict[str, Any]) -> None:
    engine([CASE, Case(3, 10, 1), Case(4, 2, 3)])
    assert settings["max_model_len"] == 13 and settings["max_num_seqs"] == 3
    assert settings["max_num_batched_tokens"] == 13 and settings["kv_cache_memory_bytes"] > 10**9
    assert not settings["enable_prefix_caching"] and settings["enforce_eager"]
    assert settings["gpu_memory_utilization"] < 0.5  # the other model's engine is on the same GPU


def test_every_request_gets_all_its_tokens_once_per_call(settings: dict[str, Any]) -> None:
    found = engine([CASE])
    for turn in range(2):
        assert found.begin(CASE) > 0 and found.advance(1) > 0 and found.advance(2) > 0
        first = 1 + 4 * turn
        assert found.finish()["tokens"] == [[first, first + 1, first + 2, first + 3]] * 2


def test_what_is_not_finished_is_dropped(settings: dict[str, Any]) -> None:
    found = engine([CASE])
    found.begin(CASE)
    assert found.finish()["tokens"] == [[1], [1]]
    found.begin(CASE)
    assert found.finish()["tokens"] == [[2], [2]]


def test_an_interrupted_request_is_an_error(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "lazy", True)
    found = engine([CASE])
    found.begin(CASE)
    with pytest.raises(UserError, match="memory is too small"):
        found.advance(3)
