"""Find settings with which a run fits into a device's memory; the cheapest are tried first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ast_sparse.planning.memory import Memory
from ast_sparse.planning.setup import Setup

_MOST_DEVICES = 1024
_SYNCS = "training.accelerator_config.gradient_accumulation_kwargs.sync_each_batch=true"

Step = Callable[[Setup], Setup]


@dataclass(frozen=True)
class Fit:
    """Settings with which a run fits, and the memory that a device needs with them."""

    setup: Setup
    memory: Memory

    def settings(self, before: Setup) -> list[str]:
        """The changed settings in the form that `--set` takes, and the number of devices if it changes."""
        after = self.setup
        names = {
            "training.gradient_checkpointing": "gradient_checkpointing",
            "training.per_device_train_batch_size": "batch_size",
            "training.gradient_accumulation_steps": "gradient_accumulation_steps",
            "training.per_device_eval_batch_size": "eval_batch_size",
        }
        changed = ["training.bf16=true"] if after.dtype != before.dtype else []
        changed += ["sparsity.fast_forward=on"] if after.fast_forward != before.fast_forward else []
        copies_go = before.masked_weights == "kept" and after.masked_weights == "made"  # `auto` decides by itself
        changed += ["sparsity.masked_weights=made"] if copies_go else []
        compressed_go = before.semi_structured == "on" != after.semi_structured
        changed += ["sparsity.semi_structured=off"] if compressed_go else []
        is_whole_again = after.sharding != "fsdp2" == before.sharding
        for name, field in names.items():
            value = getattr(after, field)
            # a sharded run may have asked for it in fsdp_config, which goes away
            if value != getattr(before, field) or (field == "gradient_checkpointing" and value and is_whole_again):
                changed.append(f"{name}={str(value).lower()}")
        changed += ["training.fsdp=true"] if after.sharding == "fsdp2" != before.sharding else []
        changed += ["training.fsdp=false", "training.fsdp_config=null"] if is_whole_again else []
        if after.shard_size != before.shard_size:
            changed.append(f"training.parallelism_config.dp_shard_size={after.shard_size}")
        changed += [_SYNCS] if after.keeps_whole_gradients != before.keeps_whole_gradients else []
        changed += [f"optimizer.moments={after.moments}"] if after.moments != before.moments else []
        changed += ["optimizer.offload=true"] if after.offload != before.offload else []
        changed += before.measured_by if before.measured_by != after.measured_by else []
        return changed + ([f"{after.world_size} devices"] if after.world_size != before.world_size else [])


def find_fit(
    memory: Callable[[Setup], Memory],
    setup: Setup,
    limit: float,
    can_shard: bool,
    can_halve: bool,
    can_offload: bool,
    can_recompute: bool = True,
) -> Fit | None:
    """The first combination of settings that fits, without the changes that are not needed.

    Args:
        memory: the memory that one device needs with a setup.
        limit: bytes that may be used.
        can_shard: whether the model can be sharded by FSDP2.
        can_halve: whether the devices compute in bf16.
        can_offload: whether masters and moments may be in host memory.
        can_recompute: whether the model supports `gradient_checkpointing`.

    Returns:
        None if nothing fits.
    """
    for devices in _numbers_of_devices(setup.world_size, can_shard):
        applied: list[Step] = [] if devices == setup.world_size else [_with_devices(devices)]
        for step in _steps(setup, devices, can_shard, can_halve, can_offload, can_recompute):
            applied.append(step)
            if memory(_apply(applied, setup)).total > limit:
                continue
            for candidate in list(applied):
                fewer = [each for each in applied if each is not candidate]
                if memory(_apply(fewer, setup)).total <= limit:
                    applied = fewer
            fitting = _apply(applied, setup)
            return Fit(fitting, memory(fitting))
    return None


def _apply(steps: list[Step], setup: Setup) -> Setup:
    for step in steps:
        setup = step(setup)
    return setup


def _steps(
    setup: Setup, devices: int, can_shard: bool, can_halve: bool, can_offload: bool, can_recompute: bool
) -> Iterator[Step]:
    """Changes that do not affect what is learned: for smaller batches, more of them are accumulated."""
    if can_halve and not setup.is_half:
        yield lambda now: replace(now, dtype=torch.bfloat16)
    if setup.semi_structured != "off":
        yield lambda now: replace(now, semi_structured="off")
    if setup.masked_weights in ("auto", "kept"):
        yield lambda now: replace(now, masked_weights="made", semi_structured="off")
    if setup.eval_batch_size > 1:
        yield lambda now: replace(now, eval_batch_size=1)
    if not setup.fast_forward and not setup.gradient_checkpointing:
        yield lambda now: replace(now, fast_forward=True)
    if can_recompute and not setup.gradient_checkpointing:
        yield lambda now: replace(now, gradient_checkpointing=True)
    if setup.keeps_whole_gradients:
        yield lambda now: replace(now, syncs_each_batch=True)
    if can_shard and devices > 1 and setup.sharding != "fsdp2" and not setup.offload:
        yield lambda now: replace(now, sharding="fsdp2", semi_structured="off")
    size = setup.batch_size
    while size % 2 == 0:
        size //= 2
        yield lambda now: replace(
            now, batch_size=now.batch_size // 2, gradient_accumulation_steps=2 * now.gradient_accumulation_steps
        )
    if can_offload and devices == 1 and not setup.offload:  # bit-equal, but slower than more devices
        yield lambda now: replace(now, offload=True, sharding="none", semi_structured="off")
    if setup.measured_by:
        yield lambda now: replace(now, measured_by=(), measured_tokens=0)


def _numbers_of_devices(first: int, can_shard: bool) -> Iterator[int]:
    yield first
    number = first
    while can_shard and number < _MOST_DEVICES:
        number *= 2
        yield number


def _with_devices(number: int) -> Step:
    """Use more devices, and keep the number of sequences per step if possible."""

    def step(now: Setup) -> Setup:
        steps, more = now.gradient_accumulation_steps, number // now.world_size
        return replace(
            now,
            world_size=number,
            sharding=now.sharding if now.sharding == "fsdp2" else "ddp",
            shard_size=now.shard_size and more * now.shard_size,  # as many replicas, in more pieces
            offload=False,
            gradient_accumulation_steps=steps // more if steps % more == 0 else steps,
        )

    return step
