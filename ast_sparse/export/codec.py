"""What a compressed format has to know about its code: names, sizes, and how to encode and decode."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_sparse.kernels.linear24 import plus_slorb
from ast_sparse.sparsity.masks import Pattern

META = "weight_meta"  # name of the positions of a layer; the values are its `weight`
SCALE = "weight_scale"  # name of the scales, if the values have fewer bits than the weight


@dataclass(frozen=True)
class Codec:
    """One way to store weights of one pattern: the kept values in order, and bytes that say where they are.

    A codec of values with few bits (`value_bits`, `scale_columns` and the two ways to round are set) has a third
    tensor: the scales `[out, ceil(in/scale_columns)]`, in the dtype of the weight.

    Attributes:
        method: `quant_method` in config.json; readers choose the codec by it.
        format_version: written to config.json. A newer one is an error.
        pattern: N:M of the weights.
        multiple: in_features of a layer must be a multiple of this, otherwise the layer is left dense.
        columns_per_byte: how many columns of the weight have their positions in one byte.
        encode: from a weight `[out, in]` and a mask (bool, exactly N of M; None: the non-zeros) to the values
            `[out, in·N/M]`, in the dtype of the weight, and the metadata `[out, in/columns_per_byte]`, uint8. With
            scales: from weight, mask and scales to the values `[out, in·N/M·value_bits/8]`, uint8, metadata and scales.
        decode: from these tensors to the weight `[out, in]`, exactly 0.0 where pruned; differentiable with respect to
            values that have the dtype of the weight.
        product: a way to compute `linear` that need not decode the whole weight, from `x, values, meta, bias`, the
            scales, if any, and `slorb`; None: decode, then `F.linear`.
        check_meta: whether `encode` could have written the metadata; damaged bytes must not decode to wrong positions.
        value_bits: bits of a kept value; None: those of the dtype of the weight.
        scale_columns: how many columns of the weight share a scale; None: there are none.
        round: from a weight `[out, in]`, the dtype of the export and, or None, weights `[in]` of the columns in the
            squared error, to the nearest weight that the codec can hold, and its scales; None: it holds any weight.
        round_with_feedback: the same with a fourth argument, the upper Cholesky factor `[in, in]` of the inverse
            Hessian of the inputs: later columns make up for the errors of earlier ones.
    """

    method: str
    format_version: int
    pattern: Pattern
    multiple: int
    columns_per_byte: int
    encode: Callable[..., tuple[Tensor, ...]]
    decode: Callable[..., Tensor]
    check_meta: Callable[[Tensor], bool]
    product: Callable[..., Tensor] | None = None
    value_bits: int | None = None
    scale_columns: int | None = None
    round: Callable[[Tensor, torch.dtype, Tensor | None], tuple[Tensor, Tensor]] | None = None
    round_with_feedback: Callable[[Tensor, torch.dtype, Tensor | None, Tensor], tuple[Tensor, Tensor]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What the stored tensors of a layer are called, in the order of `encode` and `shapes`."""
        return ("weight", META) if self.scale_columns is None else ("weight", META, SCALE)

    @property
    def cut(self) -> int:
        """A layer may be cut along in_features, as tensor parallelism does, at multiples of this."""
        return math.lcm(self.multiple, self.scale_columns or 1)

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Dtypes of the stored tensors of a weight."""
        return (dtype if self.value_bits is None else torch.uint8, torch.uint8, dtype)[: len(self.names)]

    def shapes(self, out_features: int, in_features: int) -> tuple[tuple[int, int], ...]:
        """Shapes of the stored tensors: values, metadata and, if there are any, scales."""
        kept = in_features * self.pattern.n // self.pattern.m
        width = kept if self.value_bits is None else kept * self.value_bits // 8
        shapes = (out_features, width), (out_features, in_features // self.columns_per_byte)
        return (
            shapes if self.scale_columns is None else (*shapes, (out_features, -(-in_features // self.scale_columns)))
        )

    def dense_shape(self, values: Tensor) -> tuple[int, int]:
        """The shape `[out, in]` of the decoded weight."""
        kept = values.shape[1] if self.value_bits is None else values.shape[1] * 8 // self.value_bits
        return values.shape[0], kept * self.pattern.m // self.pattern.n

    def rounded(self, weight: Tensor, dtype: torch.dtype, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The nearest weight that the codec can hold, and its scales; for a codec with `round`."""
        assert self.round is not None, "this codec holds any weight"
        return self.round(weight, dtype, importance)

    def check(self, values: Tensor, meta: Tensor, scale: Tensor | None = None) -> None:
        """Raise ValueError unless the stored tensors belong together and name positions that the pattern has."""
        fits = values.dim() == 2 and meta.dtype == torch.uint8 and (scale is None) == (self.scale_columns is None)
        fits = fits and (self.value_bits is None or values.dtype == torch.uint8)
        if fits:
            shape = self.dense_shape(values)
            found = tuple(each.shape for each in (values, meta, scale) if each is not None)
            fits = shape[1] % self.multiple == 0 and found == self.shapes(*shape)
        if not fits:
            scales = "" if scale is None else f", or scales {tuple(scale.shape)} do not"
            raise ValueError(f"metadata {tuple(meta.shape)} does not fit values {tuple(values.shape)}{scales}")
        if not self.check_meta(meta):
            raise ValueError(f"its metadata names positions that no {self.pattern} group has")
        if scale is not None and not bool(scale.isfinite().all()):
            raise ValueError("its scales are not finite")

    def linear(
        self,
        x: Tensor,
        values: Tensor,
        meta: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        slorb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`x Wᵀ + b` `[..., out]` from x `[..., in]`, W as it is stored, and b `[out]`; differentiable.

        With `slorb`, which is S `[out, rank]` and X `[rank, in]`, also `+ S(Xx)`.
        """
        scales = () if scale is None else (scale,)
        if self.product is None:
            return plus_slorb(F.linear(x, self.decode(values, meta, *scales), bias), x, slorb)
        return self.product(x, values, meta, bias, *scales, slorb)

    def stored_bytes(self, out_features: int, in_features: int, itemsize: int) -> int:
        """Size in bytes of an encoded weight whose dtype has `itemsize` bytes."""
        values, meta, *scale = (math.prod(shape) for shape in self.shapes(out_features, in_features))
        return values * (itemsize if self.value_bits is None else 1) + meta + sum(scale) * itemsize

    def bits(self, itemsize: int) -> tuple[float, float]:
        """Bits for each weight: as stored without scales, and by the paper's formula (Sec. 6.1), also without them."""
        value = self.value_bits or 8 * itemsize
        n, m = self.pattern.n, self.pattern.m
        bound = math.ceil(math.log2(math.comb(m, n)))
        return value * n / m + 8 / self.columns_per_byte, (value * n + bound) / m
