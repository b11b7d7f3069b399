"""Files of models whose layers share weights, and layers that an earlier version should have left dense."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.export.quantizer import AstSparse24Config
from ast_sparse.report.overview import layer_counts
from ast_sparse.sparsity import select
from ast_sparse.sparsity.model import sparse_layers, sparsify_model, twins
from ast_sparse.sparsity.statistics import InputRecorder
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.save import save_sparse_model
from tests.families import family_model
from tests.models import VOCAB, tiny_tokenizer

IDS = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return result


def sparse(family: str, slorb: bool = False) -> PreTrainedModel:
    model = family_model(family)
    sparsify_model(model, SparsityConfig(), SLoRBConfig(k=8) if slorb else None)
    return model


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_slorb_of_shared_layers_works_from_final_folder_checkpoint_and_export(tmp_path: Path, family: str) -> None:
    model = sparse(family, slorb=True)
    for layer in sparse_layers(model).values():
        assert layer.slorb is not None
        nn.init.normal_(layer.slorb.S, std=0.1)
    expected = logits(model)
    final, checkpoint, packed = tmp_path / "final", tmp_path / "checkpoint", tmp_path / "packed"
    save_sparse_model(model, final, {"pattern": "2:4"})
    model.save_pretrained(checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    report = export_model(model, packed, "compressed", dtype="float32")
    for folder in (final, checkpoint, packed):
        torch.testing.assert_close(logits(load_causal_lm(folder)), expected)
    layers = sparse_layers(model).values()
    assert report.pruned.parameters == sum(layer.weight.numel() for layer in layers)
    adapters = next(row for row in report.others if row.section == "SLoRB")
    assert adapters.parameters == sum(layer.slorb.S.numel() + layer.slorb.X.numel() for layer in layers if layer.slorb)


def test_zeros_of_shared_layers_are_counted_once() -> None:
    model = sparse("zamba2")
    counts = layer_counts(model)
    assert counts.keys() == sparse_layers(model).keys()


def test_statistics_of_a_shared_layer_hold_what_both_places_saw() -> None:
    model = sparse("zamba")
    layers = {name: layer for name, layer in sparse_layers(model).items() if "shared_transf.self_attn.q" in name}
    recorder = InputRecorder(layers, False, twins(model, layers))
    recorder.start()
    logits(model)
    recorder.stop()
    (seen,) = recorder.statistics().values()
    assert seen.sequences == 2 * len(IDS)


def old_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Write a compressed Mamba whose `dt_proj` is compressed too; return the logits of its weights."""
    with monkeypatch.context() as patch:
        patch.setattr(select, "read_past_forward", lambda model, layers: {})
        model = sparse("mamba")
        assert any("dt_proj" in name for name in sparse_layers(model))
        export_model(model, folder, "compressed", dtype="float32")
    plain = family_model("mamba")
    with torch.no_grad():
        for name, layer in sparse_layers(model).items():
            plain.get_submodule(name).weight.copy_(layer.masked_weight())
    return logits(plain)


def test_an_old_export_with_dt_proj_compressed_loads_and_exports_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = old_export(tmp_path / "old", monkeypatch)
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "old")), expected)
    export_model(tmp_path / "old", tmp_path / "new", "compressed", dtype="float32")
    own = AstSparse24Config(dequantize=False)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "new", quantization_config=own, dtype=torch.float32)
    torch.testing.assert_close(logits(packed), expected)


def test_an_old_export_with_dt_proj_compressed_is_refused_with_dequantize_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_export(tmp_path / "old", monkeypatch)
    own = AstSparse24Config(dequantize=False)
    with pytest.raises(UserError, match=r"dt_proj` compressed, but MambaMixer reads its weight without"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "old", quantization_config=own)


def test_a_router_that_was_pruned_on_purpose_is_compressed_too(tmp_path: Path) -> None:
    model = family_model("qwen2_moe")
    sparsify_model(model, SparsityConfig(include=("shared_expert_gate", "q_proj")))
    report = export_model(model, tmp_path / "out", "compressed", dtype="float32")
    assert report.pruned.layers == 4
    torch.testing.assert_close(logits(load_causal_lm(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1"])
def test_slorb_of_mamba_loads_where_peft_takes_it(tmp_path: Path, family: str) -> None:
    model = family_model(family)
    report = sparsify_model(model, SparsityConfig(), SLoRBConfig(k=8))
    assert report.without_slorb and all(name.endswith("out_proj") for name in report.without_slorb)
    assert any("no SLoRB" in line for line in report.lines())
    for layer in sparse_layers(model).values():
        if layer.slorb is not None:
            nn.init.normal_(layer.slorb.S, std=0.1)
    save_sparse_model(model, tmp_path, {"pattern": "2:4"})
    torch.testing.assert_close(logits(load_causal_lm(tmp_path)), logits(model))


def test_an_adapter_that_peft_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ast_sparse.sparsity.model.takes_slorb", lambda model, name: True)
        model = sparse("mamba", slorb=True)
    save_sparse_model(model, tmp_path, {"pattern": "2:4"})
    with pytest.raises(UserError, match=r"The SLoRB adapter of .* cannot be loaded: .*out_proj"):
        load_causal_lm(tmp_path)
