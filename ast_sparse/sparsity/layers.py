"""Layers with an N:M mask: dense weight, mask, straight-through product (paper Sec. 3.1).

A dense layer becomes sparse in place, by changing its class: hooks, shared references and parameter objects stay.
The mask is a boolean `Parameter`, so that it is saved with the weight. In a sharded run each process has the rows of
the mask that belong to its rows of the weight, and FSDP2 never sends them (`masked_gather.py`).
"""

from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ast_sparse.distributed.pieces import local
from ast_sparse.kernels.choice import Kernels
from ast_sparse.kernels.gpu import cusparselt
from ast_sparse.kernels.nm_masks import magnitude_mask
from ast_sparse.kernels.products import linear, masked, masked_as, product, product_as
from ast_sparse.sparsity.masked_copy import MaskedCopy
from ast_sparse.sparsity.masked_piece import carry_mask, runs_dense
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.slorb import SLoRB


def group_dim_of(layer: nn.Module) -> int:
    """The dimension of a layer's weight along which groups run: 0 in `Conv1D`, 1 in `nn.Linear`."""
    return 0 if isinstance(layer, Conv1D) else 1


def out_by_in(tensor: Tensor, group_dim: int) -> Tensor:
    """A weight or mask as a view of shape `[out, in]`; applied to such a view, it restores the original layout."""
    return tensor.t() if group_dim == 0 else tensor


class _MaskedLinear(torch.autograd.Function):
    """The product with `m ⊙ W`; backward, its whole gradient (1), or the kept part if masks are fixed.

    Without a mask the weight is masked already (`masked_gather.py`, `offload.py`), and its gradient stays whole.

    `copy` is `m ⊙ W` in autocast's dtype if the layer keeps it (`masked_copy.py`). Otherwise the masked weight is made
    again for the backward pass, as the input in autocast's dtype always is: there would be a copy of it per layer.
    `compressed` is the copy in cuSPARSELt's form, which then multiplies in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        group_dim: int,
        fixed: bool,
        copy: Tensor | None,
        compressed: Tensor | None,
    ) -> Tensor:
        lower = _lower_dtype(input)
        ctx.group_dim, ctx.fixed, ctx.bias_dtype = group_dim, fixed, None if bias is None else bias.dtype
        ctx.save_for_backward(input, weight, mask, copy)
        if lower is not None:
            input, bias = input.to(lower), None if bias is None else bias.to(lower)
        with torch.autocast(input.device.type, enabled=False):
            if compressed is not None:
                return cusparselt.linear(input, compressed, bias)
            kept = _kept(weight, mask, copy, input.dtype)
            return linear(input, kept, bias, group_dim=group_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mask, copy = ctx.saved_tensors
        grad, rows = (each.reshape(-1, each.shape[-1]) for each in (grads[0], input))
        by_rows = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            kept = out_by_in(_kept(weight, mask, copy, grad.dtype), ctx.group_dim)
            by_rows = product(grad, kept).view(input.shape).to(input.dtype)
        if ctx.needs_input_grad[1]:
            rows = rows.to(grad.dtype)
            left, right = (rows.t(), grad) if ctx.group_dim == 0 else (grad.t(), rows)
            by_weight = product_as(left, right, weight.dtype)
            by_weight = masked(by_weight, mask) if ctx.fixed and mask is not None else by_weight
        if ctx.needs_input_grad[3]:
            by_bias = grad.sum(0).to(ctx.bias_dtype)
        return by_rows, by_weight, None, by_bias, None, None, None, None


def _kept(weight: Tensor, mask: Tensor | None, copy: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`m ⊙ W` in the dtype of a product; an offloaded weight may have 16 bits without autocast, too."""
    if copy is not None:
        return copy.to(dtype)
    return weight.to(dtype) if mask is None else masked_as(weight, mask, dtype)


def _lower_dtype(input: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives the products of an input; as in autocast, float64 stays."""
    return _autocast_dtype(input.device.type) if input.dtype != torch.float64 else None


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class SparseLayer(nn.Module):
    """Base of SparseLinear and SparseConv1D. `group_dim` is the input dimension of the weight.

    Attributes:
        weight: dense weight, trained; in an offloaded layer, the masked one in the dtype of the products.
        mask: bool, shape of the weight, True = kept; not trained.
        start_mask: the first mask, eight positions per byte along `group_dim`; for the initial flip rate.
        slorb: the low-rank adapter, or None.
        pattern: the pattern that the mask must fit.
        fixed_mask: pruned weights get no gradient, because the mask will never change.
        dense_class: the class of the dense layer.
        kernels: `compiled` or `eager`; both compute the same masks and products.
        is_offloaded: the weight is masked already, and the masks are in host memory (`offload.py`).
        device_mask: a copy of a fixed mask beside the weight of an offloaded layer, for its gradient.
        gathered_masked: the forward pass gets `m ⊙ W` as weight, from FSDP2 (`masked_gather.py`).
        dense_forward: in training mode the whole weight is used; masks count for the decay and in evaluation.
        masked_copy: keeps `m ⊙ W` in 16 bits for training under autocast; None: each product makes it.
        graph_copy: what it keeps, for compiled graphs, which cannot ask whether it is up to date; None: they make it.
        graph_compressed: the same in cuSPARSELt's form, for semi-structured products; None: dense ones.
    """

    group_dim: int
    weight: Tensor
    bias: Any
    mask: nn.Parameter
    start_mask: nn.Parameter
    slorb: SLoRB | None
    pattern: Pattern
    fixed_mask: bool
    dense_class: type[nn.Module]
    kernels: Kernels = "eager"
    is_offloaded: bool = False
    device_mask: Tensor | None = None
    gathered_masked: bool = False
    dense_forward: bool = False
    masked_copy: MaskedCopy | None = None
    graph_copy: Tensor | None = None
    graph_compressed: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in `nn.Module`, which replaces the rows of a sharded weight (`.to`): the new ones carry the mask too."""
        self._forget_copy()
        super()._apply(fn, recurse)
        if self.gathered_masked:
            carry_mask(self.weight, local(self.mask))
        return self

    def train(self, mode: bool = True) -> Self:
        """As in `nn.Module`; a change of the mode forgets the copy of the masked weight."""
        if mode != self.training:
            self._forget_copy()
        return super().train(mode)

    def _forget_copy(self) -> None:
        if self.masked_copy is not None:
            self.masked_copy.forget()

    def masked_weight(self) -> Tensor:
        """The weight with pruned positions exactly 0.0, in the layer's own layout, without gradients."""
        return masked(self.weight.detach(), self.mask)

    def masked_linear(self, input: Tensor) -> Tensor:
        """`input (m ⊙ W)ᵀ + b`; gradients of the weight by STE (1). Input `[..., in]`."""
        mask: Tensor | None = self.device_mask if self.is_offloaded else self.mask
        mask = None if self.gathered_masked or runs_dense(self) else mask
        copy = None if mask is None else self._kept_copy(_lower_dtype(input))
        compressed = None if copy is None else self._compressed_copy()
        result = _MaskedLinear.apply(
            input, self.weight, mask, self.bias, self.group_dim, self.fixed_mask, copy, compressed
        )
        return cast(Tensor, result)

    def _kept_copy(self, dtype: torch.dtype | None) -> Tensor | None:
        """`m ⊙ W` in the 16 bits of autocast, up to date; None where it is not kept."""
        if torch.compiler.is_compiling():
            copy = self.graph_copy if self.training else None
            return None if copy is None or copy.dtype != dtype else copy
        if self.masked_copy is None or not self.training or self.is_offloaded:
            return None
        return None if dtype is None or dtype.itemsize != 2 else self.masked_copy.of(self.weight, self.mask, dtype)

    def _compressed_copy(self) -> Tensor | None:
        """What `_kept_copy` has just returned, in cuSPARSELt's form; None where products are dense."""
        if torch.compiler.is_compiling():
            return self.graph_compressed
        return None if self.masked_copy is None else self.masked_copy.compressed(self.group_dim)

    def set_graph_copy(self) -> None:
        """Let `graph_copy` be up to date for products under the autocast that is on now; None where it is not kept."""
        has_mask = not (self.gathered_masked or runs_dense(self))
        self.graph_copy = self._kept_copy(_autocast_dtype(self.weight.device.type)) if has_mask else None
        self.graph_compressed = None if self.graph_copy is None else self._compressed_copy()

    def drop_graph_copy(self) -> None:
        """Let go of what `set_graph_copy` has set."""
        self.graph_copy = self.graph_compressed = None

    @torch.no_grad()
    def magnitude_mask(self) -> Tensor:
        """The pattern's mask of |W|, in the layer's own layout; of this process's piece if the layer is sharded."""
        weight = local(self.weight)
        if self.pattern.structured:
            return magnitude_mask(weight, self.pattern.n, self.pattern.m, self.group_dim, self.kernels)
        return out_by_in(self.pattern.mask(out_by_in(weight.abs(), self.group_dim)), self.group_dim)

    def unpacked_start_mask(self) -> Tensor:
        """The first mask, bool, shape of the weight; this process's piece if the layer is sharded."""
        bits = unpack_bits(local(self.start_mask), self.group_dim)
        return bits.narrow(self.group_dim, 0, self.mask.shape[self.group_dim])

    def extra_repr(self) -> str:
        slorb = f", slorb k={self.slorb.k}" if self.slorb is not None else ""
        return f"{super().extra_repr()}, pattern={self.pattern}{slorb}"


class SparseLinear(SparseLayer, nn.Linear):
    """`nn.Linear` with an N:M mask: `Z = X (m ⊙ W)ᵀ + b`, groups along in_features."""

    group_dim = 1

    def forward(self, input: Tensor) -> Tensor:
        output = self.masked_linear(input)
        return output if self.slorb is None else output + self.slorb(input)


class SparseConv1D(SparseLayer, Conv1D):  # type: ignore[misc]  # Parameter there, Tensor in nn.Linear
    """GPT-2's `Conv1D` with an N:M mask; the weight stays `[in, out]`, groups run along dim 0."""

    group_dim = 0

    def forward(self, x: Tensor) -> Tensor:
        output = self.masked_linear(x)
        return output if self.slorb is None else output + self.slorb(x)


def make_sparse(
    layer: nn.Module, mask: Tensor, pattern: Pattern, fixed_mask: bool = False, dense_forward: bool = False
) -> SparseLayer:
    """Turn an `nn.Linear` or `Conv1D` into its sparse form, in place.

    Args:
        layer: the dense layer, of one of the two classes or a subclass that computes the same (Falcon's).
        mask: bool, shape of the layer's weight, True = kept.
    """
    sparse = _sparse_class(layer, pattern, fixed_mask)
    sparse.mask = nn.Parameter(mask.contiguous(), requires_grad=False)
    sparse.start_mask = nn.Parameter(pack_bits(mask, sparse.group_dim), requires_grad=False)
    sparse.slorb, sparse.dense_forward = None, dense_forward
    return sparse


def share_mask(twin: nn.Module, layer: SparseLayer) -> None:
    """Turn a dense layer that shares the weight of a sparse one into its sparse form, in place, with the same masks."""
    sparse = _sparse_class(twin, layer.pattern, layer.fixed_mask)
    sparse.mask, sparse.start_mask, sparse.slorb = layer.mask, layer.start_mask, layer.slorb
    sparse.dense_forward = layer.dense_forward


def _sparse_class(layer: nn.Module, pattern: Pattern, fixed_mask: bool) -> SparseLayer:
    dense_class = type(layer)
    layer.__class__ = SparseLinear if isinstance(layer, nn.Linear) else SparseConv1D
    sparse = cast(SparseLayer, layer)
    sparse.pattern, sparse.fixed_mask, sparse.dense_class = pattern, fixed_mask, dense_class
    return sparse


@torch.no_grad()
def make_dense(layer: SparseLayer) -> nn.Module:
    """Turn a sparse layer back into its dense class, in place, with the masked weight; SLoRB is dropped."""
    layer.weight.copy_(torch.where(layer.mask, layer.weight, 0))
    del layer.mask, layer.start_mask, layer.slorb
    dense = cast(nn.Module, layer)
    dense.__class__ = layer.dense_class
    for name in (
        "pattern", "fixed_mask", "kernels", "dense_class", "gathered_masked", "dense_forward", "masked_copy",
        "graph_copy", "graph_compressed",
    ):  # fmt: skip
        vars(dense).pop(name, None)
    return dense


def pack_bits(mask: Tensor, dim: int) -> Tensor:
    """Eight bool positions along `dim` into one uint8; the last byte is filled with zeros."""
    bits = mask.movedim(dim, -1)
    bits = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << _places(mask)).sum(-1, dtype=torch.uint8).movedim(-1, dim).contiguous()


def unpack_bits(packed: Tensor, dim: int) -> Tensor:
    """The bool positions of `pack_bits`, eight for each byte along `dim`."""
    bits = (packed.movedim(dim, -1).unsqueeze(-1) >> _places(packed)).bitwise_and_(1)
    return bits.view(torch.bool).flatten(-2).movedim(-1, dim)


def _places(like: Tensor) -> Tensor:
    """The places of the bits of a byte, made on the device: a copy of them from the host would wait for it."""
    return torch.arange(8, dtype=torch.uint8, device=like.device)
