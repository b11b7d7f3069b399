"""Check 0: what this machine can do, by which the other results are judged."""

from collections.abc import Iterator
from functools import partial

import torch

from scripts.checks.gpu_checks.bench import Bench, Line, info


def machine(bench: Bench) -> Iterator[Line]:
    """The bandwidth of a copy in bytes a second, and the rate of a bf16 product in FLOP a second."""
    if not bench.is_dry:
        found = torch.cuda.get_device_properties(0)
        sizes = {"bytes": found.total_memory, "processors": found.multi_processor_count}
        capability = f"{found.major}.{found.minor}"
        yield info("device", name=found.name, capability=capability, **sizes, start_method=bench.method)
    size = bench.pick(1 << 28, 1 << 10)
    source, target = bench.random(size), torch.empty(size, device=bench.device)
    milliseconds = bench.times({"copy": partial(target.copy_, source)})["copy"]
    yield info("copy", milliseconds=milliseconds, rate=2 * source.nbytes / milliseconds * 1e3, unit="bytes a second")
    size = bench.pick(8192, 32)
    a, b = (bench.random(size, size, dtype=torch.bfloat16) for _ in range(2))
    milliseconds = bench.times({"product": partial(torch.mm, a, b)})["product"]
    yield info("product", milliseconds=milliseconds, rate=2 * size**3 / milliseconds * 1e3, unit="FLOP a second")
