"""scripts/examples: each example runs on a tiny model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ast_sparse import export_model, load_causal_lm
from scripts.examples.keep_sparsity import main as keep_sparsity
from tests.export.sparse_models import sparse_model
from tests.models import generated_text, tiny_tokenizer


def test_a_compressed_export_is_fine_tuned_and_exported_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    export_model(sparse_model(), tmp_path / "start", dtype="float32", tokenizer=tiny_tokenizer())
    (tmp_path / "text.txt").write_text(generated_text(60))
    keep_sparsity(str(tmp_path / "start"), str(tmp_path / "text.txt"), str(tmp_path / "out"), "3")
    assert "pruned (2:4)" in capsys.readouterr().out
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("start", "out/tuned"))
    weights = [model.get_parameter("model.layers.0.mlp.up_proj.weight") for model in (before, after)]
    assert not torch.equal(*weights) and torch.equal(weights[0] == 0, weights[1] == 0)
    load_causal_lm(tmp_path / "out" / "compressed")
