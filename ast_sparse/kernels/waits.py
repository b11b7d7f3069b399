"""Which values the host has to wait for."""

from torch import Tensor


def waits(tensor: Tensor) -> bool:
    """Whether reading a value of the tensor, or making something of a size that depends on one, waits for a device.

    Code that would wait in every micro-batch takes another way there, and stays as it is on a CPU.
    """
    return tensor.device.type != "cpu"
