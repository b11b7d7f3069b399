"""How many sequences a step takes, and which accumulation keeps their number on other numbers of devices."""

from transformers import TrainingArguments

from ast_sparse.planning.plan import Hardware

_NAME = "training.gradient_accumulation_steps"


def batch_line(args: TrainingArguments, devices: int, hardware: Hardware) -> str:
    """The sequences of a step, and what keeps those of other numbers of devices: see `Hardware.compared_with`."""
    size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    total = size * accumulated * devices
    several = "device" if devices == 1 else "devices"
    line = f"batch: {size} x {accumulated} accumulated x {devices:,} {several} = {total:,} sequences per step"
    others = [number for number in hardware.compared_with(args.world_size) if number != devices]
    return "; ".join([line, *(_kept(size, accumulated, number, devices) for number in others)])


def _kept(size: int, accumulated: int, other: int, devices: int) -> str:
    """The accumulation on `devices` that keeps the batch of `other` devices."""
    wanted, least = size * accumulated * other, size * devices
    whose = f"{wanted:,}, as on {other} device{'s' if other > 1 else ''},"
    if wanted % least == 0:
        return f"{whose} with {_NAME}={wanted // least}"
    why = f"{devices:,} devices take at least {least:,}" if least > wanted else f"not a multiple of {least:,}"
    return f"{whose} with no {_NAME} ({why})"
