"""`linear24` with SLoRB: called directly, compiled, and with gradients."""

import pytest
import torch
from torch import Tensor

from ast_sparse.kernels.code24 import pack24, unpack24
from ast_sparse.kernels.linear24 import linear24
from ast_sparse.sparsity.masks import nm_mask


@pytest.fixture
def tensors() -> tuple[Tensor, ...]:
    """x, values, metadata, bias, S and X."""
    torch.manual_seed(0)
    values, meta = pack24(torch.randn(12, 32), nm_mask(torch.rand(12, 32)))
    return torch.randn(2, 3, 32), values, meta, torch.randn(12), torch.randn(12, 5), torch.randn(5, 32)


def slow(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor, s: Tensor, projection: Tensor) -> Tensor:
    dense = unpack24(values, meta).double() + s.double() @ projection.double()
    return (x.double() @ dense.T + bias.double()).float()


def test_slorb_adds_a_product_of_low_rank(tensors: tuple[Tensor, ...]) -> None:
    *first, s, projection = tensors
    torch.testing.assert_close(linear24(*first, (s, projection)), slow(*tensors))
    assert torch.equal(torch.ops.ast_sparse.linear24(*tensors), linear24(*first, (s, projection)))


def test_compilers_see_one_operation_with_slorb(tensors: tuple[Tensor, ...]) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    *first, s, projection = tensors
    found = torch.compile(linear24, backend=backend, fullgraph=True)(*first, (s, projection))
    torch.testing.assert_close(found, slow(*tensors))
    [graph] = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "functorch" not in name] == ["ast_sparse.linear24"]  # a question is no operation


@pytest.mark.parametrize("learning", [4, 5])
def test_gradients_reach_both_factors(tensors: tuple[Tensor, ...], learning: int) -> None:
    tensors[learning].requires_grad_(True)
    *first, s, projection = tensors
    linear24(*first, (s, projection)).square().sum().backward()
    found, tensors[learning].grad = tensors[learning].grad, None
    slow(*tensors).square().sum().backward()
    assert found is not None
    torch.testing.assert_close(found, tensors[learning].grad, rtol=1e-4, atol=1e-3)
