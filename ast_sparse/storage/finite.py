"""Weights that are not finite, which a mask could hide."""

import torch
from torch import Tensor, nn

from ast_sparse.distributed.pieces import local
from ast_sparse.errors import UserError


def check_finite(model: nn.Module, name: str = "the model") -> None:
    """Raise UserError that names the first parameter that is not finite, or the first stored buffer with a NaN.

    Args:
        model: its tensors on the meta device are not checked; of a sharded one, only the pieces of this process are.
        name: of the model, for messages.
    """
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    for key, value in model.state_dict().items():
        check_values(local(value), key, key in parameters, name)


def check_values(value: Tensor, key: str, is_parameter: bool, name: str) -> None:
    """Raise UserError if one tensor, or a piece of it, holds values that are not finite; as `check_finite`.

    Args:
        key: of the tensor in the model.
        is_parameter: buffers may mask by −inf.
    """
    if not value.is_floating_point() or value.is_meta:
        return
    faulty = ~torch.isfinite(value) if is_parameter else torch.isnan(value)
    if bool(faulty.any()):
        raise UserError(f"`{key}` of {name} holds values that are not finite. Copy or write the model again.")
