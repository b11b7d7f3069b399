"""Which of several ways to compute the same is the fastest on this GPU: measured once for each key, then remembered."""

import logging
from collections.abc import Callable, Hashable, Mapping

from torch import Tensor
from triton.testing import do_bench

logger = logging.getLogger(__name__)

_WARMUP_MS, _MEASURED_MS = 2, 10
_chosen: dict[Hashable, str] = {}


def fastest(key: Hashable, what: str, ways: Mapping[str, Callable[[], Tensor]]) -> str:
    """The name of the fastest way; the first call for a key measures, with an empty L2 cache, and logs one line.

    A way that fails is left out. Do not call it while a CUDA graph is captured: it waits for the GPU.

    Args:
        what: what is computed, for the log.
        ways: at least one; if none can be measured, the first is chosen.
    """
    if key not in _chosen:
        times = {name: _milliseconds(way) for name, way in ways.items()}
        name = min(times, key=lambda each: times[each])
        _chosen[key] = name
        others = "".join(f", {each} {time:.4f}" for each, time in times.items() if each != name)
        logger.info(f"{what}: {name} ({times[name]:.4f} ms{others}).")
    return _chosen[key]


def remembered(key: Hashable) -> str | None:
    """What was chosen for a key, if it was measured."""
    return _chosen.get(key)


def _milliseconds(way: Callable[[], Tensor]) -> float:
    """Median; infinite if the way fails here, whatever the reason: no such kernel on this GPU, no memory."""
    try:
        return float(do_bench(way, warmup=_WARMUP_MS, rep=_MEASURED_MS, return_mode="median"))
    except Exception as error:
        logger.debug(f"A way to multiply fails here: {type(error).__name__}: {error}")
        return float("inf")
