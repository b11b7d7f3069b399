"""The names of FSDP2 that are not public, and what changes with them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ast_sparse.distributed import full_precision
from ast_sparse.distributed.full_precision import FSDP2_INTERNALS, computes_in_float32
from tests.models import tiny_model


@pytest.fixture
def sharded() -> Iterator[Any]:
    """Two layers, sharded in one process, the inner one a group of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = nn.Sequential(fully_shard(nn.Linear(4, 4), mp_policy=policy), nn.Linear(4, 4))
    yield fully_shard(model, mp_policy=policy)
    dist.destroy_process_group()


def objects(model: Any) -> dict[str, Any]:
    """One of each kind in `FSDP2_INTERNALS`."""
    state = model._get_fsdp_state()
    (group,) = full_precision._groups(state)
    return {"module": model, "state": state, "group": group, "parameter": group.fsdp_params[0]}


def test_every_private_name_is_there_and_the_dtype_is_another_only_inside_the_block(sharded: Any) -> None:
    for model in (sharded, sharded[0]):
        found = objects(model)
        found["group"]._init_mp_dtypes()
        for kind, names in FSDP2_INTERNALS.items():
            for name in names:
                assert hasattr(found[kind], name), f"{kind}: {name}"
        assert found["parameter"].param_dtype is torch.bfloat16
    before = [found["state"]._mp_policy for found in map(objects, (sharded, sharded[0]))]
    with computes_in_float32(sharded):
        for model in (sharded, sharded[0]):
            found = objects(model)
            for kind, name in (("state", "_mp_policy"), ("group", "mp_policy"), ("parameter", "mp_policy")):
                policy = getattr(found[kind], name)
                assert policy.param_dtype is None and policy.reduce_dtype is torch.float32
            assert found["parameter"].param_dtype is None
    for model, policy in zip((sharded, sharded[0]), before, strict=True):
        found = objects(model)
        assert found["state"]._mp_policy is found["group"].mp_policy is found["parameter"].mp_policy is policy
        assert found["parameter"].param_dtype is torch.bfloat16


def test_a_whole_model_stays_as_it_is() -> None:
    model, ids = tiny_model(), torch.arange(8)[None]
    before = model(ids).logits
    with computes_in_float32(model):
        assert torch.equal(model(ids).logits, before)
