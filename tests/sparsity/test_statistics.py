"""Calibration block by block: what is measured, and on which inputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import KVSharingDict

import ast_sparse.sparsity.pruning as pruning_module
import ast_sparse.sparsity.statistics as statistics_module
from ast_sparse.basis.change import change_basis
from ast_sparse.config import BasisConfig, SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import (
    decoder_blocks,
    densify_model,
    refresh_masks,
    select_layers,
    sparse_layers,
    sparsify_model,
)
from ast_sparse.sparsity.oneshot import prune_layer, sparsegpt_prune, wanda_mask
from ast_sparse.sparsity.statistics import InputRecorder, InputStatistics, calibrate_blocks
from tests.models import VOCAB, tiny_model

FAMILIES = ("llama", "gpt2", "opt")


def samples(count: int = 3, length: int = 12) -> Tensor:
    return torch.randint(0, 60, (count, length), generator=torch.Generator().manual_seed(5))


def layer_inputs(model: nn.Module, name: str, tokens: Tensor) -> Tensor:
    """All inputs of a layer in forward passes of the whole model, `[tokens, in]` float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for row in tokens:
            model(input_ids=row[None], use_cache=False)
    handle.remove()
    return torch.cat([part.flatten(0, -2) for part in seen]).double()


@pytest.mark.parametrize("changes", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_untouched_blocks_are_those_of_the_whole_model(
    family: str, changes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[nn.Module] = []
    run_block = statistics_module.run_block
    monkeypatch.setattr(
        statistics_module, "run_block", lambda block, *args: runs.append(block) or run_block(block, *args)
    )
    model, tokens = tiny_model(family).eval(), samples()
    layers, _ = select_layers(model)
    found: dict[str, InputStatistics | None] = {}
    for statistics in calibrate_blocks(
        model, decoder_blocks(model), layers, tokens, with_hessian=True, changes=changes
    ):
        found |= statistics
    assert list(found) == list(layers)
    blocks = decoder_blocks(model).values()
    assert [runs.count(block) for block in blocks] == [
        3 if block is [*blocks][-1] or not changes else 6 for block in blocks
    ]
    for name in layers:
        inputs = layer_inputs(model, name, tokens)
        statistics = found[name]
        assert statistics is not None and statistics.hessian is not None and statistics.sequences == 3
        torch.testing.assert_close(statistics.hessian.double(), 2 * inputs.T @ inputs / 3, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(statistics.squares.double(), inputs.square().sum(0) / 3, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_each_block_is_calibrated_on_the_outputs_of_the_pruned_ones_before_it(family: str, method: str) -> None:
    model, slow, tokens = tiny_model(family).eval(), tiny_model(family).eval(), samples()
    layers, _ = select_layers(slow)
    for block in decoder_blocks(slow):  # the whole model again for every block
        inside = [name for name in layers if name.startswith(f"{block}.")]
        seen = {name: layer_inputs(slow, name, tokens).float() for name in inside}
        for name in inside:
            is_conv1d = not isinstance(layers[name], nn.Linear)
            weight = layers[name].weight.detach().t() if is_conv1d else layers[name].weight.detach()
            if method == "wanda":
                mask = wanda_mask(weight, seen[name].norm(dim=0))
            else:
                weight, mask = sparsegpt_prune(weight, 2 / 3 * seen[name].T @ seen[name])
            with torch.no_grad():
                pruned = torch.where(mask, weight, 0)
                layers[name].weight.copy_(pruned.t() if is_conv1d else pruned)
    sparsify_model(model, SparsityConfig(init=method), samples=tokens)
    for name, layer in sparse_layers(model).items():
        torch.testing.assert_close(layer.masked_weight(), layers[name].weight, rtol=1e-3, atol=1e-5)


def test_layers_with_one_input_share_one_hessian() -> None:
    model = tiny_model("llama").eval()
    layers, _ = select_layers(model)
    recorder = InputRecorder(layers, with_hessian=True)
    recorder.start()
    with torch.no_grad():
        model(input_ids=samples())
    recorder.stop()
    found = recorder.statistics()
    block = "model.layers.0"
    assert found[f"{block}.self_attn.q_proj"] is found[f"{block}.self_attn.v_proj"]
    assert found[f"{block}.mlp.gate_proj"] is found[f"{block}.mlp.up_proj"]
    assert len({id(statistics) for statistics in found.values()}) == 4 * model.config.num_hidden_layers


def test_statistics_under_autocast_are_those_without() -> None:
    inputs, found = torch.randn(3, 16, 8), []
    for enabled in (False, True):
        for with_hessian in (False, True):
            statistics = InputStatistics(8, with_hessian, torch.device("cpu"))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                statistics.add(inputs)
            found.append(statistics.squares if statistics.hessian is None else statistics.hessian)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_a_token_without_an_embedding_is_refused_wherever_a_text_calibrates() -> None:
    model, tokens = tiny_model("llama"), samples()
    tokens[-1, -1] = VOCAB
    for calibrate in (
        lambda: sparsify_model(model, SparsityConfig(init="wanda"), samples=tokens),
        lambda: change_basis(model, BasisConfig(permute=True), Pattern(2, 4), tokens),
    ):
        with pytest.raises(UserError, match=f"The text has the token {VOCAB}, but the model has {VOCAB} embeddings"):
            calibrate()
    model.resize_token_embeddings(VOCAB + 1)
    model.config.vocab_size = VOCAB  # as in families with a row more than their vocabulary
    sparsify_model(model, SparsityConfig(init="wanda"), samples=tokens)


def test_a_block_that_gets_more_from_the_text_than_hidden_states_is_refused() -> None:
    model = tiny_model("llama").eval()
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "extra": args[0].detach().clone()}), with_kwargs=True
    )
    with pytest.raises(UserError, match=r"`model\.layers\.0` of LlamaForCausalLM takes inputs other than hidden"):
        sparsify_model(model, SparsityConfig(init="wanda"), samples=samples())


def test_blocks_that_share_keys_and_values_are_refused() -> None:
    model, states = tiny_model("llama").eval(), KVSharingDict()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "shared_kv_states": states}), with_kwargs=True
        )
    sparsify_model(model, SparsityConfig(init="wanda"), samples=samples())  # an empty one is of no use to anyone
    densify_model(model)
    states["full_attention"] = (torch.zeros(1), torch.zeros(1))
    with pytest.raises(UserError, match=r"`model\.layers\.0` of LlamaForCausalLM shares keys and values"):
        sparsify_model(model, SparsityConfig(init="wanda"), samples=samples())


def test_running_means_equal_one_sum_over_all_sequences() -> None:
    inputs = torch.randn(6, 5, 8, dtype=torch.float64)
    statistics = [InputStatistics(8, with_hessian, torch.device("cpu")) for with_hessian in (False, True)]
    for batch in inputs.split([1, 3, 2]):
        for part in statistics:
            part.add(batch)
    rows = inputs.flatten(0, 1)
    for part in statistics:
        torch.testing.assert_close(part.squares.double(), rows.square().sum(0) / 6, rtol=1e-5, atol=1e-6)
    hessian = statistics[1].hessian
    assert hessian is not None
    torch.testing.assert_close(hessian.double(), rows.T @ rows / 3, rtol=1e-5, atol=1e-5)


def test_a_layer_that_no_token_reaches_is_pruned_by_magnitude_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(pruning_module.logger, "warning", said.append)
    model = tiny_model("llama").eval()
    mlp = model.model.layers[0].mlp
    mlp.unused = nn.Linear(16, 16)
    sparsify_model(model, SparsityConfig(init="sparsegpt"), samples=samples())
    assert torch.equal(mlp.unused.mask, Pattern(2, 4).mask(mlp.unused.weight.abs()))
    assert len(said) == 1 and "`model.layers.0.mlp.unused`: it is pruned by magnitude" in said[0]


def test_calibration_leaves_mode_and_hooks_as_they_were() -> None:
    model = tiny_model("llama").train()
    layers, _ = select_layers(model)
    for _ in calibrate_blocks(model, decoder_blocks(model), layers, samples(), with_hessian=False):
        assert not model.training
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_whose_blocks_do_not_run_in_order_is_refused() -> None:
    model = tiny_model("llama")
    blocks = decoder_blocks(model)
    turned = dict(reversed(blocks.items()))
    with pytest.raises(UserError, match="does not run its blocks one after the other"):
        next(calibrate_blocks(model, turned, select_layers(model)[0], samples(), with_hessian=False))


def test_a_model_that_runs_its_blocks_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    forward = type(model.model).forward

    def looped(self: nn.Module, input_ids: Tensor, inputs_embeds: None = None, **kwargs: Any) -> Any:
        return forward(self, inputs_embeds=forward(self, input_ids=input_ids, **kwargs).last_hidden_state, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", looped)
    with pytest.raises(UserError, match=r"does not run its blocks one after the other, each once"):
        next(calibrate_blocks(model, decoder_blocks(model), select_layers(model)[0], samples(), with_hessian=False))


@pytest.mark.parametrize("init", ["wanda", "sparsegpt"])
def test_a_start_mask_by_activations_needs_text(init: str) -> None:
    with pytest.raises(UserError, match=f"sparsity.init='{init}' needs text"):
        sparsify_model(tiny_model(), SparsityConfig(init=init))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["wanda", "sparsegpt"])
def test_a_start_mask_by_activations_survives_a_refresh_by_magnitude(family: str, init: str) -> None:
    model = tiny_model(family)
    sparsify_model(model, SparsityConfig(init=init), samples=samples())
    assert all(rates == (0.0, 0.0) for rates in refresh_masks(model).values())


def test_slorb_compensates_for_what_sparsegpt_took_from_the_dense_weight() -> None:
    model, dense = tiny_model("gpt2"), tiny_model("gpt2")
    sparsify_model(model, SparsityConfig(init="sparsegpt"), SLoRBConfig(k=8), samples=samples())
    for name, layer in sparse_layers(model).items():
        lost = dense.get_parameter(f"{name}.weight").t() - layer.masked_weight().t()
        assert layer.slorb is not None
        torch.testing.assert_close(layer.slorb.S, lost.unflatten(1, (-1, 8)).sum(-1) / 8)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_refresh_by_activations_changes_the_mask_and_not_the_weights(criterion: str) -> None:
    model = tiny_model("gpt2")
    sparsify_model(model, SparsityConfig(criterion=criterion))
    recorder = InputRecorder(sparse_layers(model), criterion == "sparsegpt")
    recorder.start()
    with torch.no_grad():
        model(input_ids=samples())
    recorder.stop()
    before = {name: layer.weight.clone() for name, layer in sparse_layers(model).items()}
    statistics = recorder.statistics()
    refresh_masks(model, criterion, statistics)  # type: ignore[arg-type]
    for name, layer in sparse_layers(model).items():
        expected = prune_layer(name, layer.weight.t(), criterion, Pattern(2, 4), statistics[name])  # type: ignore[arg-type]
        assert torch.equal(layer.mask, expected.mask.t()) and torch.equal(layer.weight, before[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("init", ["wanda", "sparsegpt"])
def test_models_of_other_dtypes_are_pruned_in_theirs(dtype: torch.dtype, init: str) -> None:
    model = tiny_model("llama").to(dtype)
    report = sparsify_model(model, SparsityConfig(init=init), samples=samples())
    assert all(layer.weight.dtype == dtype for layer in sparse_layers(model).values())
    assert all(0 < error < 1 for error in report.errors.values())
