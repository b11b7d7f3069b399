"""AWQ scales: what takes them back, that the model stays the same, and that they are the best ones tried."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma4TextConfig, PreTrainedModel

from ast_sparse.errors import UserError
from ast_sparse.export.awq import rounding
from ast_sparse.export.awq.folds import RowsFold
from ast_sparse.export.awq.rounding import Rounded, round_model
from ast_sparse.export.codec24_int4 import CODE24_INT4
from ast_sparse.kernels.int4 import round_to_grid
from ast_sparse.sparsity.select import select_layers
from ast_sparse.sparsity.statistics import InputStatistics
from tests.families import family_model
from tests.models import VOCAB

IDS = torch.randint(1, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
# Layers without a scale: behind GELU, behind a norm that a router reads too, behind interleaved heads.
UNSCALED: dict[str, set[str]] = {
    "llama": set(), "qwen2": set(), "mistral": set(), "gemma": set(), "gemma3_text": set(), "phi3": set(),
    "opt": set(), "gpt2": {"mlp.c_proj"}, "bloom": {"dense", "dense_4h_to_h"},
    "doge": {"self_attn.dt_proj", "self_attn.o_proj"}, "dots1": {"gate_proj", "up_proj"},
}  # fmt: skip


def model_of(family: str) -> PreTrainedModel:
    """A model whose norms have weights and biases that are not 1 and 0."""
    model = family_model(family).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits


def scale_only(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, slorb: dict | None = None
) -> tuple[Rounded, dict]:
    """Run AWQ without rounding anything; returns the scale of each layer too."""
    scales: dict[str, Tensor | None] = {}
    monkeypatch.setattr(rounding, "_write", lambda layer, done, scale=None: scales.__setitem__(layer.name, scale))
    layers, _ = select_layers(model)
    dtypes = dict.fromkeys(model.state_dict(), torch.bfloat16)
    return round_model(model, layers, slorb or {}, dtypes, torch.float32, IDS, CODE24_INT4), scales


@pytest.mark.parametrize("family", UNSCALED)
def test_scales_leave_the_unrounded_model_as_it_was(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family)
    before, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    done, scales = scale_only(model, monkeypatch)
    after = logits(model)
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6 * float(before.abs().max()))
    assert any(scale is not None and bool((scale != 1).any()) for scale in scales.values())
    assert any(not torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    unscaled = {name for name, scale in scales.items() if scale is None}
    assert unscaled == set(done.unscaled)
    assert {next((end for end in UNSCALED[family] if name.endswith(f".{end}")), name) for name in unscaled} == UNSCALED[
        family
    ]


def test_norms_stay_in_the_dtype_they_are_written_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gemma").bfloat16().float()  # 1 + w: a small w + 1 would lose bits
    before = logits(model)
    scale_only(model, monkeypatch)
    for name, value in model.state_dict().items():
        if value.dim() == 1:
            assert torch.equal(value, value.bfloat16().float()), name
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6 * float(before.abs().max()))


def test_slorb_is_scaled_with_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, generator = model_of("llama"), torch.Generator().manual_seed(3)
    layers, _ = select_layers(model)
    pairs = {}
    for name, layer in layers.items():
        rows, columns = layer.weight.shape
        shapes = (rows, columns // 4), (columns // 4, columns)
        pairs[name] = tuple(0.1 * torch.randn(shape, generator=generator) for shape in shapes)
    monkeypatch.setattr(rounding, "_rounded_pair", lambda layer, *_: (layer.slorb_S.clone(), layer.slorb_X.clone()))

    def with_pairs(pairs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        with rounding._with_slorb(model, pairs):
            return logits(model)

    before = with_pairs(pairs)
    assert not torch.allclose(before, logits(model))
    done, scales = scale_only(model, monkeypatch, pairs)
    assert all(scale is not None for scale in scales.values())
    after = with_pairs(done.slorb)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert not any("slorb" in name for name, _ in model.named_buffers())


@pytest.mark.parametrize("spread", [0, 4, 8])
def test_the_best_scale_has_the_least_error_of_the_outputs_and_is_never_worse_than_none(spread: int) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 136, generator=generator) * torch.rand(136, generator=generator) ** spread
    weight = torch.randn(12, 136, generator=generator)
    statistics = InputStatistics(136, True, torch.device("cpu"))
    statistics.add(x)

    def error(scale: Tensor) -> float:
        """From the inputs themselves, in float64."""
        rounded = round_to_grid(weight * scale, torch.bfloat16, statistics.squares / scale.square())[0]
        change = rounded.double() / scale.double() - weight.double()
        return float((x.double() @ change.t()).square().sum())

    layer = rounding._Layer("x", weight, torch.bfloat16, statistics, CODE24_INT4)
    found = rounding.best_scale([layer], RowsFold(nn.Linear(4, 136), 136, None))
    rms = x.double().square().mean(0).sqrt()
    tried = [(rms**alpha / (rms**alpha).log().mean().exp()).float() for alpha in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    assert error(found) <= 1.001 * min(error(scale) for scale in tried)
    assert error(found) <= error(torch.ones(136)) * (1 + 1e-6)
    assert spread == 0 or error(found) < 0.97 * error(torch.ones(136))


def test_inputs_that_are_not_finite_are_named() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] = torch.inf
    with pytest.raises(UserError, match=r"`model\.layers\.0\..*` gets inputs that are not finite"):
        round_model(
            model, select_layers(model)[0], {}, dict.fromkeys(model.state_dict(), torch.float32), torch.float32, IDS,
            CODE24_INT4,
        )  # fmt: skip


def test_a_layer_that_no_token_reaches_is_rounded_to_the_nearest_step_and_named() -> None:
    model = model_of("llama")
    unused = model.model.layers[0].mlp.unused = nn.Linear(16, 16)
    expected, name = round_to_grid(unused.weight.detach(), torch.float32)[0], "model.layers.0.mlp.unused"
    layers, _ = select_layers(model)
    dtypes = dict.fromkeys(model.state_dict(), torch.float32)
    done = round_model(model, layers, {}, dtypes, torch.float32, IDS, CODE24_INT4)
    assert done.unseen == [name] and not done.unscaled and name not in done.errors
    assert torch.equal(unused.weight, expected)
    assert done.lines()[0].endswith("14 of 15 layers scaled")
    assert done.lines()[1:] == ["  no scale: model.layers.*.mlp.unused (1): no token of the text reached it"]


def test_a_configuration_whose_heads_differ_by_layer_gives_no_heads() -> None:
    config = Gemma4TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert config.per_layer_config[0].head_dim != config.per_layer_config[1].head_dim
    assert rounding._attention(SimpleNamespace(config=config)) is None


def test_values_that_a_scale_would_bring_to_a_clamp_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of("olmo"), []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: seen.append(output.abs().max()))
    logits(model)
    model.config.clip_qkv = 2 * float(max(seen))  # clips nothing yet
    before = logits(model)
    done, _ = scale_only(model, monkeypatch)
    assert {name for name in done.unscaled if name.endswith("o_proj")} == {
        f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)
    }
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-6 * float(before.abs().max()))


def test_layers_of_grouped_queries_have_one_scale_for_the_columns_of_a_value() -> None:
    fold = RowsFold(nn.Linear(4, 8), 8, (2, 3, 4))
    squares = torch.arange(24.0)
    tied = fold.tie(squares).view(2, 3, 4)
    assert torch.equal(tied, squares.view(2, 3, 4).mean(1, keepdim=True).expand(2, 3, 4))


def test_each_row_takes_the_rounding_with_the_least_error_and_is_never_worse_than_the_nearest_step() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 136, generator=generator)
    x = x + 0.3 * torch.randn(x.shape, generator=generator)
    weight = torch.randn(64, 136, generator=generator)
    statistics = InputStatistics(136, True, torch.device("cpu"))
    statistics.add(x)
    scale = 0.5 + torch.rand(136, generator=generator)

    def error(rounded: Tensor) -> Tensor:
        return (x.double() @ (rounded.double() / scale.double() - weight.double()).t()).square().sum(0)

    layer = rounding._Layer("x", weight * scale, torch.bfloat16, statistics, CODE24_INT4)
    done = Rounded(4)
    nearest = round_to_grid(weight * scale, torch.bfloat16, statistics.squares / scale.square())[0]
    rounding._write(layer, done, scale)
    found = error(layer.weight)
    assert (found <= error(nearest) * (1 + 1e-5)).all() and found.sum() < 0.7 * error(nearest).sum()
    assert done.errors["x"] == pytest.approx(float(found.sum() / (x.double() @ weight.double().t()).square().sum()))
