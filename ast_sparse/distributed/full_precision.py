"""A sharded model that computes in float32 for a while, although it is trained in 16 bits.

FSDP2 keeps the dtype of its forward passes from the moment a module is sharded, and has no public way to change it.
This file does so through the names in `FSDP2_INTERNALS`, which are not public; a test compares them with the installed
version.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from ast_sparse.distributed.pieces import reshard

# By object of FSDP2: of a module, of its state, of a group of parameters in it, and of one parameter.
FSDP2_INTERNALS: dict[str, tuple[str, ...]] = {
    "module": ("_get_fsdp_state",),
    "state": ("_mp_policy",),  # and the groups, see `_groups`
    "group": ("mp_policy", "fsdp_params", "_init_mp_dtypes"),
    "parameter": ("mp_policy", "param_dtype", "all_gather_outputs", "_unsharded_inner_tensors"),
}


@contextmanager
def computes_in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes of a model that FSDP2 has sharded gather its float32 weights as they are.

    All processes must enter the block, between steps of training: gradients that are not yet reduced would be lost. A
    model that is not sharded, or without a dtype of its own for them, does not change.
    """
    states = {id(state): state for state in _states(model)}.values()
    before = [(state, state._mp_policy) for state in states if state._mp_policy.param_dtype is not None]
    if before:
        reshard(model)
    for state, policy in before:
        _set_policy(state, replace(policy, param_dtype=None))
    try:
        yield
    finally:
        if before:
            reshard(model)
        for state, policy in before:
            _set_policy(state, policy)


def _states(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module._get_fsdp_state()


def _groups(state: Any) -> list[Any]:
    """The groups of parameters that are gathered together: several since torch 2.12, one or none before."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is not None:
        return list(groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _set_policy(state: Any, policy: MixedPrecisionPolicy) -> None:
    state._mp_policy = policy
    for group in _groups(state):
        group.mp_policy = policy
        group._init_mp_dtypes()
        for parameter in group.fsdp_params:
            parameter.mp_policy = policy
            # made at the first gathering, in the dtype of that time
            parameter.all_gather_outputs, parameter._unsharded_inner_tensors = [], []
            vars(parameter).pop("_unsharded_param", None)
