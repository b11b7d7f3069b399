"""Selective recomputation: the same gradients to the bit, and what is no longer kept, counted by hand."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, PreTrainedModel, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ast_sparse import SparsityConfig
from ast_sparse.distillation.chunked import chunked_distillation_loss
from ast_sparse.kernels.cpu import onednn
from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.kernels.recompute import Recomputation, _Output, _Recipe
from ast_sparse.planning.live_bytes import LiveBytes
from ast_sparse.sparsity.model import sparsify_model
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


def test_a_block_keeps_only_what_products_and_attention_need() -> None:
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


def test_an_output_is_recomputed_once_for_consecutive_products() -> None:
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
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_kept_tensor_that_is_changed_in_place_is_an_error_as_without_hooks() -> None:
    for context in (nullcontext(), Recomputation()):
        with context:
            x = torch.arange(6.0).requires_grad_() + 1
            loss = x.pow(2).sum()
            x.detach().add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_the_chunked_loss_refuses_a_second_backward_pass() -> None:
    model, ids = tiny_model("llama").train(), torch.randint(0, VOCAB, (2, 8))
    with fast_forward(model):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss, _ = chunked_distillation_loss(hidden, model.lm_head, None, None, ids, None)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_activation_function_that_works_in_place_has_its_own_gradient() -> None:
    model, x = nn.SiLU(inplace=True), torch.linspace(-2, 2, 9, requires_grad=True)
    with fast_forward(model):
        model(x * 1).pow(2).sum().backward()
    given, x.grad = x.grad, None
    F.silu(x).pow(2).sum().backward()
    torch.testing.assert_close(given, x.grad)


@pytest.fixture
def faster_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any CPU, linear layers take the products of oneDNN."""
    monkeypatch.setattr(onednn, "is_faster", lambda: True)


def test_modules_take_keywords_as_before(faster_products: None) -> None:
    x = torch.randn(3, 8)
    mlp = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2))
    modules = [
        ("input", nn.LayerNorm(8)), ("input", nn.Linear(8, 8)), ("input", nn.SiLU()),
        ("hidden_states", LlamaRMSNorm(8)), ("x", mlp),
    ]  # fmt: skip
    for name, module in modules:
        expected = module(x)
        with fast_forward(module):
            assert "forward" in vars(module)
            torch.testing.assert_close(module(**{name: x}), expected)


@pytest.mark.parametrize("by", ["model", "FSDP"])
def test_with_activation_checkpointing_nothing_else_is_recomputed(faster_products: None, by: str) -> None:
    model = tiny_model("llama").train()
    if by == "model":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    hooks = torch._C._autograd._saved_tensors_hooks_is_enabled, torch._C._autograd._top_saved_tensors_default_hooks
    with fast_forward(model):
        assert hooks[0]() and hooks[1](False) is None
        faster = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    assert faster == {"Linear"}


def test_the_address_of_a_freed_storage_is_not_reused_while_it_is_remembered() -> None:
    x = torch.randn(8, requires_grad=True)
    output = _Output(y := x * x, _Recipe(lambda x: x * x, x))
    assert output.is_in(y)
    del y
    assert output._storage.expired()
    others = [torch.empty(8) for _ in range(1000)]
    assert not any(each.untyped_storage()._cdata == output._storage.cdata for each in others)


class InPlaceOf(torch.autograd.Function):
    """A copy of a tensor in given memory, so that reuse of freed memory does not depend on the allocator."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, memory: bytearray) -> Tensor:
        return torch.frombuffer(memory, dtype=x.dtype).copy_(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def test_a_tensor_at_the_address_of_a_freed_output_is_kept() -> None:
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
