"""Selective recomputation: the same gradients to the bit, and what is no longer kept, by hand count."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Phi3Config, PreTrainedModel, Qwen3Config

from ast_sparse import SparsityConfig
from ast_sparse.kernels.forward import fast_forward
from ast_sparse.kernels.recompute import Recomputation
from ast_sparse.sparsity.model import sparsify_model
from ast_sparse.training.memory import LiveBytes
from tests.models import VOCAB, tiny_model

MORE = {"qwen3": Qwen3Config, "gemma2": Gemma2Config, "phi3": Phi3Config}


def model_of(family: str) -> PreTrainedModel:
    if family not in MORE:
        return tiny_model(family)
    config = MORE[family](
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "opt", *MORE])
def test_gradients_are_the_same_to_the_bit(family: str, half: bool) -> None:
    usual = model_of(family).train()
    sparsify_model(usual, SparsityConfig())
    fast, ids = copy.deepcopy(usual), torch.randint(0, VOCAB, (2, 16))
    for model, context in ((usual, nullcontext()), (fast, fast_forward(fast))):
        with context:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
    for (name, expected), given in zip(usual.named_parameters(), fast.parameters(), strict=True):
        assert (expected.grad is None) == (given.grad is None), name
        assert expected.grad is None or torch.equal(expected.grad, given.grad), name


def test_a_block_keeps_what_products_and_attention_cannot_do_without() -> None:
    model, ids = tiny_model("llama").train(), torch.randint(0, VOCAB, (4, 16))
    kept = []
    for layers in (1, 2):
        model.model.layers = model.model.layers[:layers] if layers == 1 else tiny_model("llama").model.layers
        live = LiveBytes()
        live.ignore([*model.parameters(), *model.buffers()])
        with live, fast_forward(model):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            kept.append(live.now)
            del hidden
    width, kv, inner, heads = 32, 16, 48, 4
    # two inputs of norms, q, k, v, the attention's output and its logarithm of sums, gate and up
    assert kept[1] - kept[0] == 4 * 16 * 4 * (2 * width + 2 * width + 2 * kv + heads + 2 * inner)


def squares(recompute: Recomputation, x: Tensor) -> tuple[Tensor, list[int]]:
    calls: list[int] = []

    def square(x: Tensor) -> Tensor:
        calls.append(1)
        return x * x

    return recompute(square, x), calls


def test_an_output_is_made_again_once_for_the_products_that_follow_each_other() -> None:
    x = torch.arange(6.0).requires_grad_()
    recompute = Recomputation()
    with recompute:
        y, calls = squares(recompute, x)
        (y.view(2, 3).pow(3).sum() + y.pow(2).sum()).backward()
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, 6 * x.detach() ** 5 + 4 * x.detach() ** 3)


def test_an_output_that_is_changed_in_place_is_kept() -> None:
    x = torch.arange(6.0).requires_grad_()
    recompute = Recomputation()
    with recompute:
        y, calls = squares(recompute, x)
        y.add_(1)
        y.pow(2).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(x.grad, 4 * (x.detach() ** 2 + 1) * x.detach())


def test_an_input_that_is_changed_in_place_is_an_error() -> None:
    recompute = Recomputation()
    with recompute:
        x = torch.arange(6.0).requires_grad_() + 1
        y, _ = squares(recompute, x)
        loss = y.pow(2).sum()
        x.detach().add_(1)
        with pytest.raises(RuntimeError, match="changed in place"):
            loss.backward()


class InPlaceOf(torch.autograd.Function):
    """A copy of a tensor, written into given memory: freed and taken again by no luck of the allocator."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, memory: bytearray) -> Tensor:
        return torch.frombuffer(memory, dtype=x.dtype).copy_(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def test_a_tensor_in_the_place_of_a_freed_output_is_kept() -> None:
    x, memory = torch.arange(6.0).requires_grad_(), bytearray(24)
    recompute = Recomputation()
    with recompute:
        y = recompute(lambda x: InPlaceOf.apply(x * x, memory), x)
        address = y.data_ptr()
        del y
        other = InPlaceOf.apply(x + 1, memory)
        assert other.data_ptr() == address
        other.pow(2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x.detach() + 1))
