"""How the decoder blocks of a sharded model compute."""

from typing import Any

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule


def block_settings(model: Any) -> dict[str, bool]:
    """Whether blocks recompute their activations, and whether they are gathered a second time, in the backward pass."""
    blocks = [each for name, each in model.named_modules() if ".layers." in name and isinstance(each, FSDPModule)]
    groups = [group for block in blocks for group in block._get_fsdp_state()._fsdp_param_groups]
    assert groups
    return {
        "recomputed": any(isinstance(module, CheckpointWrapper) for module in model.modules()),
        "gathered again": all(group.post_forward_mesh_info is not None for group in groups),
    }
