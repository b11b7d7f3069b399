"""What every check of `gpu.py` measures with: device, times, peaks, other processes, and the lines it yields.

A check is a generator of lines. Each has a case, what was measured, what is expected, and a verdict: `met`, `missed` (a
time or a size), `wrong` (a result), `info` (nothing is expected), or `dry` (times without a GPU, which mean nothing).
"""

import ctypes
import functools
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

WARMUPS, PAIRS = 5, 20
_PR_SET_PDEATHSIG = 1  # of Linux
Line = dict[str, Any]
T = TypeVar("T")


@dataclass
class Bench:
    """The machine, and shapes that suit it.

    Attributes:
        is_dry: no GPU: tiny shapes on the CPU, Triton in its interpreter.
        deadline: of `time.monotonic()`; no process of a check may run longer.
        method: how the process of a check is started: `forkserver`, or `spawn` if CUDA does not start after a fork.
        rates: what check `machine` has measured: `copy` in bytes a second, `product` in FLOP a second.
    """

    is_dry: bool
    deadline: float
    method: str = "forkserver"
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the checks compute."""
        return torch.device("cpu" if self.is_dry else "cuda:0")

    @functools.cached_property
    def cache(self) -> Tensor:
        """Larger than the L2 cache; writing it also keeps the GPU busy for longer than two kernels take to launch."""
        return torch.empty(1 if self.is_dry else 1 << 30, dtype=torch.uint8, device=self.device)

    def choose_method(self) -> None:
        """Start processes anew if a fork has no GPU: something may have started CUDA when it was imported.

        A first process that is only slow is no reason: then each one would import everything again.
        """
        try:
            Child(self.method, _probe, self.device).result(self.left(60))
        except Unanswered as error:
            print(f"The first process: {error}.", file=sys.stderr)
        except ChildError as error:
            print(f"Processes are not forked: {error}", file=sys.stderr)
            self.method = "spawn"

    def start(self, function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None) -> "Child":
        """A module-level function in another process; this one must not have used its GPU."""
        # the server of `forkserver` cannot be reached from here, and its modules are loaded in this process already
        method = "fork" if self.method == "forkserver" else self.method
        return Child(method, function, *args, environment=environment)

    def in_child(self, function: Callable[..., Any], *args: Any, most: float = 120.0) -> Any:
        """What a module-level function returns in another process."""
        return self.start(function, *args).result(self.left(most))

    def pick(self, full: T, dry: T) -> T:
        """What suits a GPU, or what suits a dry run."""
        return dry if self.is_dry else full

    def left(self, most: float) -> float:
        """Seconds until the deadline, at most `most`; more without a GPU, where others may use the same cores."""
        return max(min(self.deadline - time.monotonic(), self.pick(most, 10 * most)), 0.1)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers; the seed is that of the process."""
        return torch.randn(*shape, device=self.device).to(dtype)

    def times(self, sides: Mapping[str, Callable[[], Any]], empties_cache: bool = True) -> dict[str, float]:
        """Median milliseconds of each side; they take turns, and each round begins with another one."""
        found: dict[str, list[float]] = {name: [] for name in sides}
        warmups, pairs = self.pick((WARMUPS, PAIRS), (0, 1))
        names = list(sides)
        for round_ in range(warmups + pairs):
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                if empties_cache:
                    self.cache.zero_()
                elapsed = self.milliseconds(sides[name])
                if round_ >= warmups:
                    found[name].append(elapsed)
        return {name: statistics.median(all_) for name, all_ in found.items()}

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """The time of one call on the device."""
        clock = Clock(self.is_dry)
        clock.mark()
        call()
        clock.mark()
        return clock.milliseconds()[0]

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call adds at its peak to what is allocated; None without a GPU."""
        if self.is_dry:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before


class Clock:
    """Moments on the device, by CUDA events; without a GPU, of the processor."""

    def __init__(self, is_dry: bool) -> None:
        self.is_dry = is_dry
        self.moments: list[Any] = []

    def mark(self) -> None:
        """Note a moment, without a wait."""
        if self.is_dry:
            self.moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.moments.append(event)

    def milliseconds(self) -> list[float]:
        """Between each moment and the next one; waits for the last."""
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        if self.is_dry:
            return [1e3 * (end - start) for start, end in pairs]
        self.moments[-1].synchronize()
        return [float(start.elapsed_time(end)) for start, end in pairs]


# ---- lines ---------------------------------------------------------------------------------------------------------


def info(case: str, **measured: Any) -> Line:
    """A line of which nothing is expected."""
    return {"case": case, "measured": _rounded(measured), "verdict": "info"}


def right(case: str, is_right: bool, expected: str, **measured: Any) -> Line:
    """A line about a result, which is wrong if it is not as expected."""
    verdict = "met" if is_right else "wrong"
    return {"case": case, "measured": _rounded(measured), "expected": expected, "verdict": verdict}


def cost(bench: Bench, case: str, value: float | None, goal: float, **measured: Any) -> Line:
    """A line about a time or a size that must not be above a goal; None if it cannot be measured here."""
    verdict = "dry" if bench.is_dry or value is None else "met" if value <= goal else "missed"
    found = {"ratio": value, **measured}
    return {"case": case, "measured": _rounded(found), "expected": f"<= {goal:g}", "verdict": verdict}


def counted(case: str, found: float, most: float, **measured: Any) -> Line:
    """A line about how often something happens, which must not be more often than that."""
    verdict = "met" if found <= most else "missed"
    return {
        "case": case,
        "measured": _rounded({"found": found, **measured}),
        "expected": f"<= {most:g}",
        "verdict": verdict,
    }


def compared(bench: Bench, case: str, times: Mapping[str, float], against: str, goal: float, **more: Any) -> Line:
    """A line about the time of `ours` over that of another side."""
    ratio = times["ours"] / max(times[against], 1e-9)
    return cost(bench, case, ratio, goal, against=against, milliseconds=dict(times), **more)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _rounded(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def launched(events: Iterable[Any]) -> list[Any]:
    """The events of a profile that are kernels; copies, and regions that are only named, are none."""
    found = [each for each in events if each.device_type == torch.autograd.DeviceType.CUDA]
    return [each for each in found if not (each.is_user_annotation or each.key.startswith(("Memcpy", "Memset")))]


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest error over the largest entry; infinite if it is not a number."""
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-300)
    return float(error) if torch.isfinite(error) else float("inf")


@contextmanager
def float32_sums() -> Iterator[None]:
    """cuBLAS may otherwise add shares of a sum in 16 bits."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before


@contextmanager
def compiled_for(bench: Bench) -> Iterator[None]:
    """In a dry run dynamo traces, but nothing is compiled: that would take a minute on a CPU."""
    if not bench.is_dry:
        yield
        return
    original = torch.compile

    def traced(function: Any, *, options: Any = None, **others: Any) -> Any:
        return original(function, backend="eager", **others)

    with mock.patch("torch.compile", traced):
        yield


# ---- other processes -----------------------------------------------------------------------------------------------


class ChildError(RuntimeError):
    """A process of a check has failed, with its last line; or it has ended, or did not answer in time."""


class Unanswered(ChildError):
    """A process did not answer in time."""


class Child:
    """A function in a process of its own: a fresh CUDA context, its own memory, its own process group.

    It sends what the function yields, or what it returns. It ends when this process does.
    """

    def __init__(
        self, method: str, function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        context: Any = multiprocessing.get_context(method)
        self._answers, theirs = context.Pipe(duplex=False)
        given = (theirs, dict(environment or {}), function, args)
        self.process = context.Process(target=_answer, args=given)
        self.process.start()
        theirs.close()

    def next(self, deadline: float) -> tuple[str, Any]:
        """The next answer: `line`, `result` or `error`, and its value.

        Raises:
            TimeoutError: there is none by then.
            ChildError: the process has ended without a result.
        """
        if not self._answers.poll(max(deadline - time.monotonic(), 0)):
            raise TimeoutError
        try:
            kind, value = self._answers.recv()
        except EOFError:
            self.process.join(10)
            raise ChildError(f"the process has ended with exit code {self.process.exitcode}") from None
        return kind, value

    def result(self, seconds: float) -> Any:
        """What the function returns.

        Raises:
            ChildError: it failed, or did not return in time.
        """
        try:
            kind, value = self.next(time.monotonic() + seconds)
        except TimeoutError:
            self.process.kill()
            raise Unanswered(f"no result after {seconds:.0f} s") from None
        finally:
            self.end()
        if kind == "error":
            raise ChildError(value)
        return value

    def exit_code(self, seconds: float) -> int | None:
        """The exit code of a function that ends its process; None, and it is ended, if it does not in time."""
        self.process.join(seconds)
        code: int | None = self.process.exitcode
        self.end()
        return code

    def end(self) -> None:
        """End the process if it has not ended."""
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _probe(device: torch.device) -> float:
    return torch.ones(1, device=device).item()


def waits_of(call: Callable[[], Any]) -> list[str]:
    """Where a call waits for the GPU."""
    with waits() as found:
        call()
    return found


@contextmanager
def waits() -> Iterator[list[str]]:
    """Inside, a line of code is added for each wait for the GPU."""
    lines: list[str] = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # setting the mode gives a notice of its own, which is no wait
    of = [each for each in found if "called a synchronizing" in str(each.message)]
    lines += [f"{each.filename.rsplit('/', 1)[-1]}:{each.lineno}" for each in of]


def _answer(answers: Any, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    os.dup2(2, 1)  # the lines of the command are its standard output, and nothing else
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the process that has started it
    try:
        torch.manual_seed(0)
        result = function(*args)
        if isinstance(result, Iterator):
            for line in result:
                answers.send(("line", line))
            result = None
        answers.send(("result", result))
    except Exception as error:
        traceback.print_exc()
        answers.send(("error", f"{type(error).__name__}: {error}"[:1500]))
    finally:
        answers.close()
        sys.stdout.flush()
