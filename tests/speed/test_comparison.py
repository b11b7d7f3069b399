"""What is compared, and what is refused before weights are read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ast_sparse.errors import UserError
from ast_sparse.speed import comparison as room
from ast_sparse.speed.cases import Case
from ast_sparse.speed.comparison import find_comparison, with_dense_folder
from ast_sparse.storage.files import read_json
from tests.export.sparse_models import save_run_checkpoint, sparse_model
from tests.models import save_tiny_model
from tests.speed.sides import write_exports

SHORT: dict[str, Any] = dict(cases=[Case(8, 8, 1)])


def test_an_export_is_compared_with_itself_decoded(exports: Path) -> None:
    found = find_comparison(exports / "compressed", **SHORT)
    assert list(found.specs) == ["compressed", "dense"] and found.is_decoded
    assert [spec.compressed for spec in found.specs.values()] == [True, False]
    assert found.specs["dense"].folder == found.specs["compressed"].folder
    assert found.weights["compressed"].total < found.weights["dense"].total
    assert "with the same zeros" in found.notes[0]


def test_another_model_takes_its_place(exports: Path) -> None:
    found = find_comparison(exports / "compressed", exports / "dense", **SHORT)
    assert found.specs["dense"].folder == str(exports / "dense") and not found.is_decoded and not found.notes


def test_a_dense_model_without_another_is_alone(exports: Path) -> None:
    found = find_comparison(exports / "dense", **SHORT)
    assert list(found.specs) == list(found.weights) == ["model"] and "alone" in found.notes[0]


def test_dtype_is_that_of_the_model_unless_it_is_given(tmp_path: Path) -> None:
    folder = write_exports(tmp_path, dtype="bfloat16") / "compressed"
    assert {spec.dtype for spec in find_comparison(folder, **SHORT).specs.values()} == {"bfloat16"}
    wide = find_comparison(folder, dtype="float32", **SHORT)
    assert wide.settings["dtype"] == "float32" and wide.weights["dense"].total > 10**4


def test_usual_lengths_that_do_not_fit_are_named_and_asked_ones_refused(tmp_path: Path) -> None:
    config = json.loads((save_tiny_model(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 300}))
    found = find_comparison(tmp_path, batches=[1])
    assert found.cases == (Case(128, 128, 1),)
    assert [outcome.case for outcome in found.too_long] == [Case(128, 1024, 1), Case(1024, 128, 1), Case(1024, 1024, 1)]
    assert "1,152 tokens, but 300 positions" in found.too_long[0].reason
    with pytest.raises(UserError, match=r"--lengths 200/101 makes 301 tokens, but .* has 300 positions"):
        find_comparison(tmp_path, cases=[Case(200, 101, 1)])
    assert find_comparison(tmp_path, cases=[Case(200, 100, 1)]).cases == (Case(200, 100, 1),)


def test_too_few_positions_for_any_usual_length(exports: Path) -> None:
    with pytest.raises(UserError, match="has 128 positions, too few for the usual lengths"):
        find_comparison(exports / "dense")


def test_models_that_cannot_be_compared_are_refused(exports: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        find_comparison(tmp_path / "none", **SHORT)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        find_comparison(exports / "dense", tmp_path, **SHORT)
    with pytest.raises(UserError, match=r"is a compressed export\. Give a dense model"):
        find_comparison(exports / "dense", exports / "compressed", **SHORT)
    model = AutoModelForCausalLM.from_pretrained(exports / "dense")
    model.resize_token_embeddings(130)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"vocabulary of 128 tokens, --against .* one of 130"):
        find_comparison(exports / "dense", tmp_path, **SHORT)


def test_vllm_must_be_installed(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs vLLM, which is not installed here"):
        find_comparison(exports / "compressed", engine="vllm", **SHORT)


def test_vllm_is_not_given_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_run_checkpoint(sparse_model(slorb_k=8), tmp_path / "checkpoint-3")
    assert find_comparison(folder, **SHORT).weights["model"].total > 0
    monkeypatch.setattr(room, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"is a checkpoint of a run, with masks, .*\. Write it with ast-export"):
        find_comparison(folder, engine="vllm", **SHORT)


def test_vllm_gets_a_dense_folder_with_the_same_zeros(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: name)
    found = find_comparison(exports / "compressed", engine="vllm", **SHORT)
    assert found.specs["compressed"].cache_bytes == 2 * 2 * 2 * 8 * (8 + 8 + 128) * 4  # K and V, layers, heads, size
    with with_dense_folder(found) as ready:
        folder = Path(ready.specs["dense"].folder)
        assert "quantization_config" not in read_json(folder / "config.json")
        written, ours = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, exports / "dense"))
        assert all(torch.equal(value, ours.state_dict()[name]) for name, value in written.state_dict().items())
    assert not folder.exists()


def test_transformers_decodes_by_itself(exports: Path) -> None:
    found = find_comparison(exports / "compressed", **SHORT)
    with with_dense_folder(found) as ready:
        assert ready is found
    with with_dense_folder(replace(found, is_decoded=False)) as ready:
        assert ready.specs == found.specs


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "own")
    config = read_json(folder / "config.json") | {"auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert find_comparison(folder, **SHORT).specs  # transformers has code for it
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own"}))
    with pytest.raises(UserError, match="own` needs code that comes with it, and ast-bench runs none"):
        find_comparison(folder, **SHORT)
