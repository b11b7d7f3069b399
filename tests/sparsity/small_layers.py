"""A small sparse layer."""

import torch
from torch import nn

from ast_sparse.sparsity.layers import SparseLinear, make_sparse
from ast_sparse.sparsity.masks import Pattern, nm_mask


def sparse_linear(fixed: bool = False) -> SparseLinear:
    torch.manual_seed(0)
    layer = nn.Linear(8, 3).double()
    make_sparse(layer, nm_mask(layer.weight.abs()), Pattern(2, 4), fixed)
    assert isinstance(layer, SparseLinear)
    return layer
