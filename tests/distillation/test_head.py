from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from ast_sparse.distillation.head import UnknownHeadError, find_output_head, hidden_states, loss_for_logits
from tests.distillation.heads import SMALL, changed
from tests.models import FAMILIES, VOCAB, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_without_scale_or_cap(family: str) -> None:
    model = tiny_model(family).train()
    head = find_output_head(model)
    assert head.linear is model.get_output_embeddings() and head.scale == 1 and head.softcap is None
    assert model.training and "forward" not in vars(head.linear)


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0), 1.0, 30.0),
        (CohereConfig(**SMALL, logit_scale=0.0625), 0.0625, None),
        (GraniteConfig(**SMALL, logits_scaling=6.0), 1 / 6, None),
    ],
    ids=["gemma2", "cohere", "granite"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_cap_are_those_of_the_model(config: Any, scale: float, softcap: float, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    head = find_output_head(model)
    assert head.scale == pytest.approx(scale, rel=1e-9)
    assert head.softcap == (softcap and pytest.approx(softcap, rel=1e-9))
    ids = torch.arange(6).view(2, 3)
    with hidden_states(head) as captured, torch.no_grad():
        model(ids)
    values = head.linear(captured[0]) * head.scale
    values = values if softcap is None else head.softcap * torch.tanh(values / head.softcap)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(values, model(ids).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 4), "not there"),
        (changed(shift=1.0), "other than by a factor"),
        (changed(factor=torch.linspace(1, 2, VOCAB)), "other than by a factor"),
    ],
)
def test_a_model_that_does_something_else_is_not_understood(model: nn.Module, message: str) -> None:
    with pytest.raises(UnknownHeadError, match=message):
        find_output_head(model)


def test_a_head_that_is_watched_is_left_alone() -> None:
    model = tiny_model("llama")
    head = find_output_head(model)
    assert head.belongs_to(model)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    assert not head.belongs_to(model)
    with pytest.raises(UnknownHeadError, match="hooks"):
        find_output_head(model)


def test_a_product_that_is_no_layer_of_the_model_is_not_understood() -> None:
    model = tiny_model("llama")
    model.lm_head, head = nn.Identity(), model.lm_head
    model.get_output_embeddings = lambda: head
    with pytest.raises(UnknownHeadError):
        find_output_head(model)


def test_outputs_hold_the_loss_and_no_logits_while_the_loss_stands_for_them() -> None:
    model = tiny_model("llama")
    ids = torch.arange(6).view(2, 3)

    def loss_of(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.sum(), torch.tensor(6)

    with loss_for_logits(model, find_output_head(model), loss_of) as tokens:
        outputs = model(ids)
    assert tokens == [torch.tensor(6)] and outputs.logits is None and outputs["logits"] is None
    outputs.loss.backward()
    assert model.model.norm.weight.grad is not None
    again = model(ids)
    assert again.loss is None and again.logits.shape == (2, 3, VOCAB)
