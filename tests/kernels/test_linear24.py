"""`linear24` is F.linear of the decoded weight, whoever looks at it: gradients, torch.func, traces and compilers."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from ast_sparse.kernels.code24 import unpack24
from ast_sparse.kernels.linear24 import linear24
from tests.kernels.native.random24 import NIBBLES

RANDOM = torch.Generator().manual_seed(0)
X, VALUES = (torch.randn(shape, generator=RANDOM) for shape in ((3, 32), (16, 16)))
BOTH = NIBBLES[torch.randint(6, (16, 4, 2), generator=RANDOM)]
META = BOTH[..., 0] | BOTH[..., 1] << 4
WEIGHT = unpack24(VALUES, META)


def product(x: Tensor) -> Tensor:
    return linear24(x, VALUES, META)


def jvp(x: Tensor) -> Tensor:
    found: Tensor = torch.func.jvp(product, (torch.zeros_like(x),), (x,))[1]
    return found


def dual(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        found: Tensor = forward_ad.unpack_dual(product(forward_ad.make_dual(torch.zeros_like(x), x))).tangent
        return found


def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.compile(function, backend="aot_eager", fullgraph=True)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "call": product,
    "inference": torch.inference_mode()(product),
    "vmap": torch.func.vmap(product),
    "jvp": jvp,
    "dual": dual,
    "jacrev": lambda x: x @ torch.func.jacrev(product)(x[0]).t(),
    "trace": lambda x: torch.jit.trace(product, torch.zeros_like(x))(x),
    "make_fx": lambda x: make_fx(product)(torch.zeros_like(x))(x),
    "compile": lambda x: compiled(product)(x),
    "compile, jvp": lambda x: compiled(jvp)(x),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", WAYS)
def test_the_product_is_that_of_the_decoded_weight(way: str) -> None:
    torch._dynamo.reset()
    torch.testing.assert_close(WAYS[way](X), F.linear(X, WEIGHT))


def test_gradients_are_those_of_the_decoded_weight() -> None:
    inputs = [each.double().requires_grad_() for each in (X, VALUES, torch.ones(16))]
    assert torch.autograd.gradcheck(lambda x, values, bias: linear24(x, values, META, bias), inputs)


def test_an_exported_program_has_one_operation() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return product(x)

    with torch.no_grad():
        program = torch.export.export(Layer(), (torch.zeros(3, 32),))
    assert [str(node.target) for node in program.graph.nodes].count("ast_sparse.linear24.default") == 1
    torch.testing.assert_close(program.module()(X), F.linear(X, WEIGHT))


def test_autocast_sets_the_dtype_whether_compiled_or_not() -> None:
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(X, WEIGHT)
        for x in (X, X.bfloat16()):
            assert torch.equal(product(x), expected) and torch.equal(compiled(product)(x), expected)


def test_a_mode_that_counts_operations_sees_the_product() -> None:
    with FlopCounterMode(display=False) as counter:
        product(X)
    assert counter.get_total_flops() == 2 * 3 * 16 * 32


@pytest.mark.parametrize("bias", [torch.ones(16).bfloat16(), torch.ones(8), torch.ones(17)], ids=["dtype", "8", "17"])
def test_a_bias_that_does_not_fit_is_an_error_as_in_pytorch(bias: Tensor) -> None:
    with pytest.raises(RuntimeError):
        linear24(X, VALUES, META, bias)


def test_a_bias_of_one_entry_is_that_of_all_rows() -> None:
    torch.testing.assert_close(linear24(X, VALUES, META, torch.ones(1)), F.linear(X, WEIGHT, torch.ones(1)))


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 0, 32), (1, 1, 32), (2, 3, 32)], ids=str)
def test_the_shape_is_that_of_pytorch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(product(x), F.linear(x, WEIGHT))


@pytest.mark.parametrize("out_features", [0, 1])
def test_a_weight_may_have_few_rows(out_features: int) -> None:
    found = linear24(X, VALUES[:out_features], META[:out_features])
    torch.testing.assert_close(found, F.linear(X, WEIGHT[:out_features]))


def test_another_memory_format_of_x_is_as_in_pytorch() -> None:
    for x in (X.t().contiguous().t(), X.repeat(1, 2)[:, ::2], X[:1].expand(3, -1), X.to_sparse()):
        torch.testing.assert_close(product(x), F.linear(x.to_dense() if x.is_sparse else x, WEIGHT))
