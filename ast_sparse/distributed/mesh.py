"""The processes of a sharded run as a grid: replicas, and the processes that each replica is split over."""

from functools import cache

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_NAMES = ("dp_replicate", "dp_shard")  # as accelerate and torchtitan call them


@cache
def process_grid(device_type: str, replicas: int, shards: int) -> DeviceMesh:
    """The grid `[replicas, shards]`, or one dimension if there is one replica; every process must call this.

    Neighbouring ranks share a replica, so that one which fills a node is split inside the node. There is one grid for
    all models of a run.

    Raises:
        RuntimeError: there is no process group, or `replicas · shards` is not its size.
    """
    if replicas == 1:
        return init_device_mesh(device_type, (shards,), mesh_dim_names=_NAMES[1:])
    return init_device_mesh(device_type, (replicas, shards), mesh_dim_names=_NAMES)
