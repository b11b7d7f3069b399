from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ast_sparse.kernels.cpu import heap, setting
from ast_sparse.sparsity.select import decoder_blocks
from tests.models import tiny_config, tiny_model
from tests.training.small_runs import blocks, trainer


@pytest.mark.parametrize(("layers", "parts"), [(1, 1), (2, 2), (4, 4), (6, 3), (7, 4), (9, 3)])
def test_freed_memory_is_returned_around_four_parts_of_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, parts: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(setting, "is_enabled", lambda: True)
    monkeypatch.setattr(heap, "_malloc_trim", lambda: calls.append)
    config = tiny_config("llama")
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with heap.freed_memory_given_back(list(decoder_blocks(model).values()), torch.device("meta")):
        model(torch.ones(1, 8, dtype=torch.long))
    assert calls == []
    run = trainer(tmp_path, model, args=dict(max_steps=2, gradient_accumulation_steps=1), eval_dataset=blocks())
    run.train()
    assert calls == [0] * 2 * (1 + 2 * parts)  # not in the teacher's blocks, nor in evaluation
    run.evaluate()
    assert len(calls) == 2 * (1 + 2 * parts)


def test_on_other_machines_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting, "is_enabled", lambda: False)
    model = tiny_model("gpt2")
    with heap.freed_memory_given_back(list(decoder_blocks(model).values()), torch.device("cpu")):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_malloc_trim_works_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[Any] = []
    trim = heap._malloc_trim()
    monkeypatch.setattr(setting, "is_enabled", lambda: True)
    monkeypatch.setattr(heap, "_malloc_trim", lambda: lambda pad: returned.append(trim(pad)))
    model, ids = tiny_model("gpt2"), torch.ones(1, 8, dtype=torch.long)
    with heap.freed_memory_given_back(list(decoder_blocks(model).values()), torch.device("cpu")):
        model(ids, labels=ids).loss.backward()
    assert returned and set(returned) <= {0, 1}  # whether memory was returned
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_freed_memory_is_returned_to_the_system_of_a_cpu_and_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: calls.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("cuda"))
    for enabled in (True, False):
        monkeypatch.setattr(setting, "is_enabled", lambda enabled=enabled: enabled)
        for device in ("cpu", "cuda", "meta"):
            heap.return_freed_memory(torch.device(device))
    assert calls == [0, "cuda", "cuda"]
