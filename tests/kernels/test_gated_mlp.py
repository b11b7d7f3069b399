"""Gated MLPs are recognised by running them; any other module, or a doubtful one, keeps its own forward."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bloom.configuration_bloom import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomMLP
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from ast_sparse.kernels import gated_mlp
from ast_sparse.kernels.fast_forward import fast_forward
from ast_sparse.kernels.gated_mlp import GatedMLP, find_gated_mlp
from ast_sparse.planning.live_bytes import LiveBytes

SIZES: dict[str, Any] = dict(hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=2)
LLAMA = GatedMLP(("gate_proj", "up_proj"), 0, "act_fn", "down_proj")


class Gated(nn.Module):
    """Parts with other names than those of Llama, called in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w3(x) * self.act(self.w1(x)))


class UpFirst(nn.Module):
    """One product, whose second half is the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.out, self.act = nn.Linear(8, 24), nn.Linear(12, 8), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.out(up * self.act(gate))


class DropoutInside(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.dropout(self.w3(x) * self.act(self.w1(x)), 0.001, self.training))


class DropoutAsActivation(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Dropout(0.5)


class DropoutBeside(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(super().forward(x))


class Limited(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w3(x).clamp(-7, 7) * self.act(self.w1(x)))


class Scaled(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class InFloat32(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w3(x) * self.act(self.w1(x).float()).to(x.dtype))


class GateOfUp(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w3(x) + self.w1(x)) * self.w1(x))


class Residual(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class NoGate(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)))


class SumOfBoth(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w3(x) + self.act(self.w1(x)))


class ReadsWeights(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.w1.weight.dtype))


@pytest.mark.parametrize(
    ("module", "mlp"),
    [
        (LlamaMLP(LlamaConfig(**SIZES)), LLAMA),
        (Phi3MLP(Phi3Config(**SIZES)), GatedMLP(("gate_up_proj",), 0, "activation_fn", "down_proj")),
        (Gated(), GatedMLP(("w3", "w1"), 1, "act", "w2")),
        (UpFirst(), GatedMLP(("both",), 1, "act", "out")),
    ],
    ids=lambda given: type(given).__name__,
)
def test_parts_are_recognised_by_what_they_compute(module: nn.Module, mlp: GatedMLP) -> None:
    assert find_gated_mlp(module) == mlp
    assert find_gated_mlp(copy.deepcopy(module).to("meta")) == mlp


@pytest.mark.parametrize(
    "kind",
    [
        DropoutInside, DropoutAsActivation, DropoutBeside, Limited, Scaled, InFloat32, GateOfUp, Residual, NoGate,
        SumOfBoth, ReadsWeights,
    ],
)  # fmt: skip
def test_what_computes_anything_else_keeps_its_forward(kind: type[nn.Module]) -> None:
    for module in (kind().train(), kind().eval()):
        assert find_gated_mlp(module) is None


def test_other_parts_of_models_keep_their_forward() -> None:
    config = LlamaConfig(vocab_size=16, num_hidden_layers=1, **SIZES)
    for module in (
        GPT2MLP(16, GPT2Config(n_embd=8, n_head=2)),
        BloomMLP(BloomConfig(hidden_size=8, n_head=2)),
        LlamaDecoderLayer(config, 0),
        LlamaModel(config),
    ):
        assert find_gated_mlp(module) is None


@pytest.mark.parametrize("kind", [Gated, UpFirst])
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    usual, x = kind(), torch.randn(2, 5, 8, requires_grad=True)
    fast = copy.deepcopy(usual)
    expected = usual(x)
    expected_grads = torch.autograd.grad(expected.square().sum(), [x, *usual.parameters()])
    live = LiveBytes()
    live.ignore([x, *fast.parameters()])
    with live, fast_forward(fast):
        given = fast(x)
        assert live.now == 4 * 10 * (2 * 12 + 8)  # gate, up and the output
        grads = torch.autograd.grad(given.square().sum(), [x, *fast.parameters()])
    assert torch.equal(given, expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected_grads, strict=True))


def test_trying_a_module_changes_nothing() -> None:
    module, called = DropoutInside().train(), []
    for each in module.modules():
        each.register_forward_hook(lambda *_: called.append(1))
    state, before = torch.get_rng_state(), {name: dict(vars(each)) for name, each in module.named_modules()}
    find_gated_mlp(module)
    assert torch.equal(torch.get_rng_state(), state) and not called
    assert all(p.grad is None for p in module.parameters())
    assert {name: dict(vars(each)) for name, each in module.named_modules()} == before


def test_hooks_of_the_parts_run_as_before() -> None:
    module, called = LlamaMLP(LlamaConfig(**SIZES)), []
    for name, each in module.named_children():
        each.register_forward_hook(lambda *_, name=name: called.append(name))
    with fast_forward(module):
        module(torch.randn(2, 8))
    assert sorted(called) == ["act_fn", "down_proj", "gate_proj", "up_proj"]


def test_a_module_is_tried_once_until_its_parts_change(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[nn.Module] = []
    inner = gated_mlp._try
    monkeypatch.setattr(gated_mlp, "_try", lambda module, act: tries.append(module) or inner(module, act))
    module = LlamaMLP(LlamaConfig(**SIZES))
    for _ in range(3):
        assert find_gated_mlp(module) == LLAMA
    assert len(tries) == 1
    module.act_fn = nn.Dropout(0.5)
    assert find_gated_mlp(module) is None and len(tries) == 2
