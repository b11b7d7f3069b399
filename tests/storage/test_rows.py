"""Models read tensor by tensor are those that transformers loads, to the bit, and fail with the same messages."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ast_sparse.config import ModelConfig
from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.storage.files import read_json, write_json
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.meta import meta_student
from ast_sparse.storage.origin import hub_commit
from ast_sparse.storage.rows import copied, read_causal_lm
from ast_sparse.storage.source_files import Source
from ast_sparse.training.fsdp import without_weights
from tests.export.sparse_models import save_run_checkpoint, save_training_checkpoint, sparse_model, token_ids
from tests.families import family_model
from tests.hub_cache import COMMIT, OLDER, put_on_hub
from tests.models import save_tiny_model


@pytest.mark.parametrize(
    ("family", "is_direct"),
    [("llama", True), ("gemma2", True), ("gpt2", True), ("opt", True), ("gpt_neox", False), ("mixtral", False)],
)
def test_weights_and_buffers_are_those_of_transformers(family: str, is_direct: bool, tmp_path: Path) -> None:
    family_model(family).bfloat16().save_pretrained(tmp_path, max_shard_size="40kB")  # several files and an index
    expected, read = load_causal_lm(tmp_path), read_causal_lm(tmp_path)
    half = read_causal_lm(tmp_path, dtype=torch.bfloat16)
    copy = copied(expected, without_weights(expected), torch.bfloat16)
    assert (Source(tmp_path, None, {}).stored() is not None) == is_direct
    assert read.config.to_dict() == expected.config.to_dict() and not read.training
    assert len(read._weight_conversions) == len(expected._weight_conversions)  # what saving undoes
    assert expected.state_dict().keys() == read.state_dict().keys()
    for name, parameter in expected.named_parameters(remove_duplicate=False):
        assert torch.equal(read.get_parameter(name), parameter)
        for cast in (half, copy):
            assert cast.get_parameter(name).dtype == torch.bfloat16
            assert torch.equal(cast.get_parameter(name), parameter.bfloat16())
    for name, buffer in expected.named_buffers():
        for model in (read, half, copy):
            assert model.get_buffer(name).dtype == buffer.dtype and torch.equal(model.get_buffer(name), buffer)
    assert [name for name, _ in read.named_parameters()] == [name for name, _ in expected.named_parameters()]  # ties


@pytest.mark.parametrize("fault", ["missing", "shape", "not finite"])
def test_a_checkpoint_that_does_not_fit_has_the_same_error(fault: str, tmp_path: Path) -> None:
    file = save_tiny_model(tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][:-4].contiguous()
    else:
        tensors[name][-1, -1] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    messages = []
    for read in (load_causal_lm, read_causal_lm):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            read(file.parent)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_slorb_of_a_model_on_the_hub_is_attached_as_that_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(sparse_model(slorb_k=8), tmp_path / "out", "dense", dtype="float32")
    expected = load_causal_lm(tmp_path / "out")(token_ids()).logits
    name = put_on_hub(tmp_path / "out", tmp_path / "hub", monkeypatch)
    for read in (load_causal_lm, read_causal_lm):
        assert torch.equal(read(name)(token_ids()).logits, expected)
    with pytest.raises(UserError, match="'org/tiny' is the result of a run, with masks or SLoRB"):
        meta_student(ModelConfig(name_or_path=name))


def test_a_revision_has_the_weights_and_the_slorb_of_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sparse_model(slorb_k=8)
    export_model(model, tmp_path / "old", "dense", dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.mul_(2)
    export_model(model, tmp_path / "new", "dense", dtype="float32")
    old, new = (load_causal_lm(tmp_path / folder)(token_ids()).logits for folder in ("old", "new"))
    assert not torch.allclose(old, new)
    name = put_on_hub(tmp_path / "new", tmp_path / "hub", monkeypatch, older=tmp_path / "old")
    for read in (load_causal_lm, read_causal_lm):
        for revision, commit, expected in ((OLDER, OLDER, old), ("main", COMMIT, new), (None, COMMIT, new)):
            found = read(name, revision=revision)
            assert torch.equal(found(token_ids()).logits, expected) and hub_commit(found.config) == commit


def test_an_adapter_that_the_hub_lacks_is_not_passed_over_unless_it_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_model(sparse_model(slorb_k=8), out, "dense", dtype="float32")
    (out / "slorb" / "adapter_model.safetensors").unlink()
    name = put_on_hub(out, tmp_path / "first", monkeypatch)
    with pytest.raises(UserError, match="Cannot load the SLoRB adapter of `org/tiny`"):
        load_causal_lm(name)
    (out / "slorb" / "adapter_config.json").unlink()
    name = put_on_hub(out, tmp_path / "second", monkeypatch)
    with pytest.raises(UserError, match=r"`org/tiny` was trained with SLoRB, .* `org/tiny/slorb` is missing"):
        load_causal_lm(name)
    write_json(out / "sparsity_config.json", {**read_json(out / "sparsity_config.json"), "slorb": False})
    name = put_on_hub(out, tmp_path / "third", monkeypatch)
    for read in (load_causal_lm, read_causal_lm):
        assert read(name).state_dict().keys() == load_causal_lm(out).state_dict().keys()


def test_a_checkpoint_of_a_run_with_slorb_needs_no_adapter_beside_it(tmp_path: Path) -> None:
    folder = save_run_checkpoint(sparse_model(slorb_k=8), tmp_path / "checkpoint-3")
    assert torch.equal(read_causal_lm(folder)(token_ids()).logits, load_causal_lm(folder)(token_ids()).logits)
    assert Source(folder, None, {}).load(exact=True).dtype == torch.float32


def test_masks_on_the_hub_are_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_training_checkpoint(sparse_model(slorb_k=8), tmp_path / "checkpoint-3")
    name = put_on_hub(folder, tmp_path / "hub", monkeypatch)
    for read in (load_causal_lm, read_causal_lm):
        with pytest.raises(UserError, match=r"`org/tiny` is a checkpoint of a run, .*: hf download org/tiny"):
            read(name)
