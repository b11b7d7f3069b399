"""A copy of `m ⊙ W` in the 16 bits of the products, written again whenever weight or mask have changed.

Without it each product makes the masked weight: in the forward pass, in the backward pass, and once more where blocks
are recomputed, in every micro-batch. With it the weight is read once a step. It costs 2 bytes a weight.

A stale copy would be a silent wrong result. So a copy is used only if all of this is as it was when it was written:

- the memory of weight and mask, and their version counters, which every in-place operation of PyTorch raises, also one
  on `.detach()`, and also the compiled updates of this package;
- how many steps the optimizers of this process have made: some write through `.data`, which no counter sees;
- the mode of the layer: leaving training mode forgets the copy, and in evaluation mode there is none;
- the stream, because the copy of one stream may not be written yet in another. A CUDA graph gets no copy at all: it
  would compute with the same one for ever.

What cannot be seen is a write through `.data`, or by other code than PyTorch's, between the micro-batches of one step.
Call `forget` after such a write.

For semi-structured products (`kernels/gpu/cusparselt.py`) the copy is also compressed, once, which costs 1.125 bytes a
weight. The backward pass multiplies by the transposed weight, whose groups do not fit, so it needs the copy as it is.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ast_sparse.kernels.gpu import cusparselt
from ast_sparse.kernels.products import masked_as

MaskedWeights = Literal["kept", "made"]
_steps = 0  # of all optimizers of this process


@dataclass
class _Written:
    """A copy, and what it was written from.

    Attributes:
        compressed: the copy in cuSPARSELt's form, once it has been asked for.
    """

    values: Tensor
    storages: tuple[StorageWeakRef, StorageWeakRef]  # while these exist, no other storage has their addresses
    state: tuple[Any, ...]
    compressed: Tensor | None = None

    def is_of(self, weight: Tensor, mask: Tensor, state: tuple[Any, ...]) -> bool:
        same = all(ref.cdata == _address(each) for ref, each in zip(self.storages, (weight, mask), strict=True))
        return same and self.state == state


class MaskedCopy:
    """The copy of one weight; layers that share a weight share it. Not a tensor of the module: it is never saved.

    A copy or a pickle of the layer begins without one.

    Args:
        semi_structured: `compressed` has cuSPARSELt's form of the copy; masks must keep at most two of every four.
    """

    def __init__(self, semi_structured: bool = False) -> None:
        self._semi_structured = semi_structured
        self._written: _Written | None = None

    def __reduce__(self) -> tuple[type["MaskedCopy"], tuple[bool]]:
        return MaskedCopy, (self._semi_structured,)

    def of(self, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`m ⊙ W` in `dtype`, as `masked_as` makes it, written now if the last one is not up to date.

        Args:
            weight: any float dtype; mask: bool of its shape, True = kept.

        Returns:
            None if no copy can be kept here: subclasses of tensors, inference mode, a CUDA graph.
        """
        if not _can_be_watched(weight, mask):
            return None
        state = _state(weight, mask, dtype)
        written = self._written  # one read: threads of `nn.DataParallel` share this object
        if written is None or not written.is_of(weight, mask, state):
            _count_steps()
            written = self._written = None  # its memory is free for the new one
            storages = StorageWeakRef(weight.untyped_storage()), StorageWeakRef(mask.untyped_storage())
            written = _Written(masked_as(weight.detach(), mask.detach(), dtype), storages, state)
            self._written = written
        return written.values

    def compressed(self, group_dim: int) -> Tensor | None:
        """What `of` has just returned, as cuSPARSELt takes it; None if its products are not wanted or not possible.

        Args:
            group_dim: the dimension of the weight along which groups run.
        """
        written = self._written
        if not self._semi_structured or written is None:
            return None
        if written.compressed is None:
            weight = written.values.t() if group_dim == 0 else written.values
            if cusparselt.takes(weight.shape[0], weight.shape[1], weight.dtype, weight.device):
                written.compressed = cusparselt.compress(weight.contiguous())
        return written.compressed

    def forget(self) -> None:
        """Free the copy; the next product writes a new one."""
        self._written = None

    @property
    def nbytes(self) -> int:
        """Bytes of the copy that is there now, and of its compressed form."""
        written = self._written
        tensors = () if written is None else (written.values, written.compressed)
        return sum(each.nbytes for each in tensors if each is not None)


def _can_be_watched(weight: Tensor, mask: Tensor) -> bool:
    if {type(weight), type(mask)} - {Tensor, nn.Parameter} or weight.is_meta:
        return False
    if torch.is_inference_mode_enabled() or weight.is_inference() or mask.is_inference():
        return False
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())


def _state(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    return (dtype, stream, _steps, *_about(weight), *_about(mask))


def _about(tensor: Tensor) -> tuple[Any, ...]:
    return tensor._version, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@cache
def _count_steps() -> None:
    """Count the steps of all optimizers from now on."""

    def count(*_: Any) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)
