"""Weights that are not finite, which a mask could hide."""

import torch
from torch import nn

from ast_sparse.distributed.pieces import local
from ast_sparse.errors import UserError


def check_finite(model: nn.Module, name: str = "the model") -> None:
    """Raise UserError that names the first parameter that is not finite, or the first stored buffer with a NaN.

    Args:
        model: its tensors on the meta device are not checked; of a sharded one, this process's pieces are.
        name: of the model, for messages.
    """
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    for key, value in model.state_dict().items():
        if not value.is_floating_point() or value.is_meta:
            continue
        value = local(value)
        faulty = ~torch.isfinite(value) if key in parameters else torch.isnan(value)  # buffers may mask by -inf
        if bool(faulty.any()):
            raise UserError(f"`{key}` of {name} holds values that are not finite. Copy or write the model again.")
