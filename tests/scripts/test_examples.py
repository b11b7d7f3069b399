"""scripts/examples, each on a tiny model, and the table of the quickstart."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ast_sparse import export_model, load_causal_lm
from scripts.examples.keep_sparsity import main as keep_sparsity
from scripts.quickstart import summary
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


def test_the_table_of_the_quickstart_measures_each_model_that_has_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 3, 0]])  # one of the kept is zero
    for name, tensors in {
        "run": {"a.weight": weight, "b.weight": weight.clone()},
        "dense": {"a.weight": weight, "b.weight": torch.ones(1, 8)},
        "compressed": {"a.weight": torch.ones(1, 4), "a.weight_meta": torch.ones(1, 1, dtype=torch.uint8)},
    }.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        layers = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
        (tmp_path / name / "sparsity_config.json").write_text(json.dumps({"layers": layers}))
    stages = ("dense", "one-shot 2:4", "retrained 2:4")
    result = {"perplexity": 9.0, "windows": 3, "seq_len": 8}
    (tmp_path / "run/results.json").write_text(json.dumps({stage: {"heldout": result} for stage in stages}))
    rows = [{"model": str(tmp_path / name), "perplexity": 9.0} for name in ("dense", "compressed")]
    (tmp_path / "eval.json").write_text(json.dumps({"results": rows}))
    measured = {"cases": [{"case": {"prompt": 64}, "timings": {}}], "settings": {"threads": 1}}
    (tmp_path / "speed.json").write_text(json.dumps(measured))
    summary(tmp_path)
    lines = capsys.readouterr().out.splitlines()[3:8]
    assert [line.split("9.00")[1].split()[0] for line in lines] == ["0%", "-", "62.500%", "31.250%", "50.000%"]
