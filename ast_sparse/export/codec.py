"""What a compressed format has to know about its code: names, sizes, and how to encode and decode."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.sparsity.masks import Pattern

META = "weight_meta"  # name of the positions of a layer; the values are its `weight`


@dataclass(frozen=True)
class Codec:
    """One way to store weights of one pattern: the kept values in order, and bytes that say where they are.

    Attributes:
        method: `quant_method` in config.json; readers choose the codec by it.
        format_version: written to config.json. A newer one is an error.
        pattern: N:M of the weights.
        multiple: in_features of a layer must be a multiple of this, otherwise the layer is left dense.
        columns_per_byte: how many columns of the weight have their positions in one byte.
        encode: from a weight `[out, in]` and a mask (bool, exactly N of M; None: the non-zeros) to the values
            `[out, in·N/M]`, in the dtype of the weight, and the metadata `[out, in/columns_per_byte]`, uint8.
        decode: from values and metadata to the weight `[out, in]`, exactly 0.0 where pruned; differentiable with
            respect to the values.
        product: a way to compute `linear` that need not decode the whole weight; None: decode, then `F.linear`.
        check_meta: whether `encode` could have written the metadata; damaged bytes must not decode to wrong positions.
    """

    method: str
    format_version: int
    pattern: Pattern
    multiple: int
    columns_per_byte: int
    encode: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor], Tensor]
    check_meta: Callable[[Tensor], bool]
    product: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None

    def shapes(self, out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the values and of the metadata."""
        kept = in_features * self.pattern.n // self.pattern.m
        return (out_features, kept), (out_features, in_features // self.columns_per_byte)

    def dense_shape(self, values: Tensor) -> tuple[int, int]:
        """The shape `[out, in]` of the decoded weight."""
        return values.shape[0], values.shape[1] * self.pattern.m // self.pattern.n

    def check(self, values: Tensor, meta: Tensor) -> None:
        """Raise ValueError unless values and metadata belong together and name positions that the pattern has."""
        fits = values.dim() == 2 and meta.dtype == torch.uint8
        if fits:
            shape = self.dense_shape(values)
            fits = shape[1] % self.multiple == 0 and (values.shape, meta.shape) == self.shapes(*shape)
        if not fits:
            raise ValueError(f"metadata {tuple(meta.shape)} does not fit values {tuple(values.shape)}")
        if not self.check_meta(meta):
            raise ValueError(f"its metadata names positions that no {self.pattern} group has")

    def linear(self, x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x Wᵀ + b` `[..., out]` from x `[..., in]`, W as values and metadata, and b `[out]`; differentiable."""
        if self.product is None:
            return F.linear(x, self.decode(values, meta), bias)
        return self.product(x, values, meta, bias)

    def stored_bytes(self, numel: int, itemsize: int) -> int:
        """Size in bytes of an encoded weight with `numel` entries of `itemsize` bytes."""
        return numel * self.pattern.n // self.pattern.m * itemsize + numel // self.columns_per_byte
