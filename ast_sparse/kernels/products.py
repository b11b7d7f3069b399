"""The masked weight `m ⊙ W`, and masked gradients."""

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is True, and 0.0 elsewhere, never -0.0; bit for bit `torch.where(mask, values, 0)`.

    On a CPU the bits of the values and of the mask are joined: `torch.where` goes element by element there, and takes
    twenty times as long.

    Args:
        values: any float dtype; mask: bool of its shape.
    """
    integer = _INTEGERS.get(values.element_size())
    plain = type(values) in (Tensor, torch.nn.Parameter) and values.device.type == "cpu"
    if integer is None or not plain or torch.compiler.is_compiling():
        return torch.where(mask, values, 0)
    bits = (-mask.view(torch.int8)).to(integer)  # all ones where kept
    return bits.bitwise_and_(values.detach().view(integer)).view(values.dtype)
