"""Which values the host has to wait for."""

import torch


def waits(device: torch.device) -> bool:
    """Whether reading a value of a tensor there, or making something of a size that depends on one, waits for it.

    Code that would wait in every micro-batch takes another way there, and stays as it is on a CPU.
    """
    return device.type != "cpu"
