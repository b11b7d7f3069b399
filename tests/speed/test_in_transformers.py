"""The engine of transformers continues prompts as `generate` does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ast_sparse.errors import UserError
from ast_sparse.export.quantizer import CompressedLinear
from ast_sparse.speed import in_transformers
from ast_sparse.speed.cases import Case
from ast_sparse.speed.in_transformers import TransformersEngine
from tests.models import VOCAB
from tests.speed.sides import write_exports

CASE = Case(prompt=9, new=7, batch=3)


def engine(folder: Path, compressed: bool) -> TransformersEngine:
    return TransformersEngine(folder, "float32", "cpu", compressed, VOCAB)


def generated(engine: TransformersEngine, turns: tuple[int, ...]) -> Any:
    seconds = [engine.begin(CASE), *(engine.advance(steps) for steps in turns)]
    assert all(each > 0 for each in seconds)
    end = engine.finish()
    assert end["peak"] > 10**6
    return end["tokens"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_formats_give_the_tokens_of_generate(family: str, tmp_path: Path) -> None:
    folder = write_exports(tmp_path, family)
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "dense")
    prompts = CASE.prompts(VOCAB)
    whole = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=7, min_new_tokens=7, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    expected = whole[:, 9:].tolist()
    compressed, dense = engine(folder / "compressed", True), engine(folder / "dense", False)
    assert any(isinstance(layer, CompressedLinear) for layer in compressed.model.modules())
    assert generated(compressed, (6,)) == generated(compressed, (2, 4)) == expected
    assert generated(dense, (1, 5)) == generated(engine(folder / "compressed", False), (6,)) == expected


def test_an_adapter_is_used_in_both_formats(tmp_path: Path) -> None:
    folder = write_exports(tmp_path, slorb_k=8)
    compressed, dense = engine(folder / "compressed", True), engine(folder / "dense", False)
    assert all(any("lora_A" in name for name, _ in each.model.named_modules()) for each in (compressed, dense))
    assert generated(compressed, (6,)) == generated(dense, (6,))


def test_a_model_without_a_cache_is_refused(exports: Path) -> None:
    found = engine(exports / "dense", False)
    found.model.forward = lambda **_: {"logits": torch.zeros(3, 1, VOCAB)}
    with pytest.raises(UserError, match="keeps no cache"):
        found.begin(CASE)


def test_the_second_gpu_is_the_one_that_is_waited_for_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    waited: list[torch.device] = []
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(model, "to", lambda device: model)
    monkeypatch.setattr(in_transformers, "load_causal_lm", lambda folder, dtype: model)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    TransformersEngine(Path("model"), "float32", "cuda:1", False, VOCAB)._wait()
    assert chosen == waited == [torch.device("cuda:1")]
    TransformersEngine(Path("model"), "float32", "cuda", False, VOCAB)._wait()
    assert len(chosen) == 1 and len(waited) == 2  # without a number it is the current one
