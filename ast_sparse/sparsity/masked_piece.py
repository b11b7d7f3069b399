"""A process's rows of a weight, which mask themselves before FSDP2 sends them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from ast_sparse.kernels.products import masked_as


def runs_dense(layer: nn.Module) -> bool:
    """Whether a layer computes with its whole weight now: in training with a dense forward pass."""
    return layer.training and getattr(layer, "dense_forward", False)


class MaskedPiece(Tensor):
    """A process's rows of a weight. FSDP2 calls the two methods, with these arguments, around every all-gather.

    Attributes:
        mask: bool, of the same rows; None while the layer is dense.
    """

    mask: Tensor | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as Parameter: results are plain

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor], None]:
        """What is sent: `m ⊙ W` in the dtype of the forward pass, with as many rows on each process of the mesh."""
        rows = self.as_subclass(Tensor)
        dtype, mask = mp_policy.param_dtype or rows.dtype, None if runs_dense(module) else self.mask
        rows = rows.to(dtype) if mask is None else masked_as(rows, mask, dtype)
        missing = -(-outer_size[0] // mesh.size()) - rows.shape[0]
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
        return (rows,), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The gathered rows are the weight; with `out`, they are in its memory already."""
        return None if out is not None else (outputs[0], ())


def carry_mask(weight: Any, mask: Tensor | None) -> MaskedPiece:
    """Let the rows of a sharded weight (a DTensor) carry the mask of these rows, in place; None leaves it as it is."""
    if not isinstance(weight._local_tensor, MaskedPiece):
        weight._local_tensor = weight._local_tensor.as_subclass(MaskedPiece)
    piece: MaskedPiece = weight._local_tensor
    piece.mask = piece.mask if mask is None else mask
    return piece
