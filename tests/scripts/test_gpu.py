"""The checks of a GPU: run without one, and with one that is imitated."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ast_sparse.basis.change import BasisReport
from ast_sparse.kernels.gpu import cusparselt
from ast_sparse.sparsity.masks import Pattern
from scripts.checks import gpu
from scripts.checks.gpu_checks import basis, kernels, linear24, losses, machine, steps
from scripts.checks.gpu_checks import bench as benches
from scripts.checks.gpu_checks.bench import Bench, Child, ChildError, Clock, Line, cost, info, launched, right, worst
from tests.kernels.gpu.cpu_cusparselt import cpu_cusparselt

NONE = "0 wrong, 0 failed, 0 missed, 0 skipped."
NAMES = [check.name for check in gpu.CHECKS]
WITH_MODELS = ("accelerate", "click", "datasets", "huggingface_hub", "peft", "safetensors", "transformers", "yaml")


def run(*options: str, path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """The command without a GPU; modules in the folder `path` hide others."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = f"{path}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, gpu.__file__, "--dry", "--seconds", "900", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_check_runs_and_is_right(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "lines.jsonl"), "--commit", "abc")
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert list(dict.fromkeys(line["check"] for line in lines)) == NAMES
    assert {line["verdict"] for line in lines} == {"met", "dry", "info"}
    assert all(line["commit"] == "abc" and line["versions"]["torch"] == torch.__version__ for line in lines)
    printed = done.stdout.splitlines()
    assert [line["case"] for line in lines] == [json.loads(line)["case"] for line in printed[1 : len(lines) + 1]]
    assert printed[-1] == f"{NONE} Times and sizes were not measured." and len(printed) == len(lines) + len(NAMES) + 2


def test_products_with_compressed_weights_need_torch_and_triton_only(tmp_path: Path) -> None:
    for name in WITH_MODELS:
        (tmp_path / f"{name}.py").write_text("raise ImportError('hidden')")
    done = run("--only", "linear24", "--only", "step", path=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    assert done.returncode == 0 and lines[0] == {
        "check": "step", "number": 8, "verdict": "skipped", "reason": "transformers cannot be imported: hidden"
    }  # fmt: skip
    parts = {line["case"].split(":")[0] for line in lines[1:]}
    assert parts == {name for name, _ in linear24.parts(Bench(True, 0.0))}
    assert {line["verdict"] for line in lines[1:]} == {"met", "dry", "info"}


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What the command sets in this process is undone."""
    for name in ("PYTHONPATH", "PYTORCH_NVML_BASED_CUDA_CHECK", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return monkeypatch


def test_checks_are_named_and_skipped_once_time_is_out(
    restored: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restored.setattr(sys, "argv", ["gpu.py", "--dry", "--seconds", "0"])
    assert gpu.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")][1:]
    assert [line["check"] for line in lines] == NAMES
    assert {(line["verdict"], line["reason"]) for line in lines} == {("skipped", "out of time")}


def test_the_time_to_find_a_gpu_counts(restored: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    restored.setattr(sys, "argv", ["gpu.py", "--seconds", "100", "--commit", "abc"])
    restored.setattr(gpu, "_has_gpu", lambda: time.sleep(0.4) or True)
    restored.setattr(gpu, "run", lambda options, deadline, output: found.append(deadline))
    started = time.monotonic()
    assert gpu.main() == 0
    assert found[0] - started < 100.3


def test_without_a_gpu_it_says_how_to_run_it(restored: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    restored.setattr(sys, "argv", ["gpu.py"])
    restored.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2 and "--dry" in capsys.readouterr().err


# ---- processes -----------------------------------------------------------------------------------------------------


def crash(bench: Bench) -> Iterator[Line]:
    yield right("first", True, "")
    os.kill(os.getpid(), signal.SIGKILL)


def fail(bench: Bench) -> Iterator[Line]:
    yield right("first", False, "")
    raise ValueError("a shape does not fit")


def hang(bench: Bench) -> Iterator[Line]:
    yield right("first", True, "")
    time.sleep(60)


@pytest.mark.parametrize(
    ("check", "seconds", "verdict", "reason"),
    [
        (crash, 30.0, "failed", "the process has ended with exit code -9"),
        (fail, 30.0, "failed", "ValueError: a shape does not fit"),
        (hang, 0.03, "failed", "stopped after 0 s"),
        (hang, 30.0, "skipped", "out of time"),
    ],
)
def test_a_check_that_ends_badly_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, check: Any, seconds: float, verdict: str, reason: str
) -> None:
    monkeypatch.setattr(gpu.Check, "function", property(lambda self: check))
    left = 0.5 if verdict == "skipped" else 30.0
    bench = Bench(True, time.monotonic() + left, method="fork")
    first, last = gpu.lines_of(gpu.Check(0, "x", "", (), seconds), bench)
    assert first["case"] == "first" and last == {"verdict": verdict, "reason": reason}


def say_time_left(bench: Bench) -> Iterator[Line]:
    yield info("", seconds=bench.left(1e6))


def test_a_check_ends_by_itself_before_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.Check, "function", property(lambda self: say_time_left))
    for own, left in ((1.0, 9.0), (100.0, 30.0)):  # a dry run has ten times as much
        bench = Bench(True, time.monotonic() + 30, method="fork")
        (line,) = gpu.lines_of(gpu.Check(0, "x", "", (), own), bench)
        assert 0.1 < line["measured"]["seconds"] <= left


def test_a_part_for_which_time_runs_out_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(True, time.monotonic() + 60)

    def endless() -> Iterator[Line]:
        while True:
            bench.deadline = 0.0
            yield right("a", True, "")

    assert linear24.parts(bench)[-1][0] == "products"
    monkeypatch.setattr(linear24, "parts", lambda bench: [("first", endless), ("second", endless)])
    found = [(line["case"], line["verdict"]) for line in linear24.linear24(bench)]
    assert found == [("first: a", "met"), ("first", "skipped"), ("second", "skipped")]


def leave(code: int) -> None:
    sys.exit(code)


def test_the_exit_code_of_a_process_and_its_time() -> None:
    assert Child("fork", leave, 75).exit_code(30) == 75
    with pytest.raises(ChildError, match="no result after 0 s"):
        Child("fork", time.sleep, 60).result(0.2)


def test_a_fork_without_a_gpu_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(device: torch.device) -> None:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(benches, "_probe", failing)
    bench = Bench(True, time.monotonic() + 30, method="fork")
    bench.choose_method()
    assert bench.method == "spawn"


def test_a_fork_that_is_only_slow_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "_probe", lambda device: time.sleep(60))
    bench = Bench(True, time.monotonic() + 0.2, method="fork")
    bench.choose_method()
    assert bench.method == "fork"


# ---- lines ---------------------------------------------------------------------------------------------------------


def test_verdicts() -> None:
    on_gpu, dry = Bench(False, 0.0), Bench(True, 0.0)
    assert [cost(on_gpu, "", value, 1.0)["verdict"] for value in (1.0, 1.01, None)] == ["met", "missed", "dry"]
    assert cost(dry, "", 0.5, 1.0)["verdict"] == "dry"
    assert [right("", each, "")["verdict"] for each in (True, False)] == ["met", "wrong"]
    assert worst(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert worst(torch.tensor([2.0, 3.0]), torch.tensor([2.0, 4.0])) == 0.25


def test_wrong_and_failed_lines_decide_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    check = gpu.CHECKS[0]
    for verdict, is_bad in {"met": False, "missed": False, "skipped": False, "wrong": True, "failed": True}.items():
        with gpu.Output(None, {}) as output:
            output.write(check, {"case": "a", "verdict": verdict})
            output.write_summary()
        assert output.is_bad is is_bad
        last = NONE if verdict == "met" else NONE.replace(f"0 {verdict}", f"1 {verdict}")
        assert capsys.readouterr().out.splitlines()[-1] == last


def test_the_summary_begins_with_what_is_worst(capsys: pytest.CaptureFixture[str]) -> None:
    with gpu.Output(None, {}) as output:
        for verdict in ("skipped", "missed", "met", "failed", "wrong", "missed"):
            output.write(gpu.CHECKS[0], {"case": "a", "verdict": verdict, "measured": 2, "expected": "1"})
        output.write_summary()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-6:-1]] == ["wrong", "failed", "missed", "missed", "skipped"]
    assert printed[-6] == "wrong    machine, a: 2, expected 1"
    assert printed[-1] == "1 wrong, 1 failed, 2 missed, 1 skipped."


def test_an_error_beyond_rounding_is_wrong() -> None:
    expected = torch.ones(4, dtype=torch.float64)
    for last, verdict in ((1 + 2**-8, "met"), (1 + 2**-6, "wrong"), (torch.nan, "wrong")):
        found = torch.tensor([1, last, 1, 1]).bfloat16()
        assert linear24.compared("", found, expected, 64)["verdict"] == verdict


# ---- a GPU that is imitated: what --dry cannot reach ---------------------------------------------------------------


class Event:
    """Each one is recorded 2 ms after the last."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 2.0
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


class Imitated(Bench):
    """As on a GPU, but on the CPU and at tiny sizes."""

    device = torch.device("cpu")  # type: ignore[assignment]
    cache = torch.empty(1)  # type: ignore[assignment]

    def pick(self, full: Any, dry: Any) -> Any:
        return dry


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> Bench:
    def sync_mode(mode: str) -> None:
        if mode == "warn":  # PyTorch's own notice
            notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing"
            warnings.warn(f"{notice} operations", stacklevel=2)
        if mode == "default":  # as if one operation had waited
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    numbers = dict(
        memory_allocated=lambda: 10, max_memory_allocated=lambda: 30, reset_peak_memory_stats=lambda: None,
        memory_reserved=lambda: 40, max_memory_reserved=lambda: 50, mem_get_info=lambda: (100, 200),
        synchronize=lambda: None, set_sync_debug_mode=sync_mode, Event=Event,
        get_device_properties=lambda _: SimpleNamespace(
            name="H", total_memory=1, multi_processor_count=2, major=9, minor=0
        ),
    )  # fmt: skip
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (kernels, losses):  # nothing is compiled
        compiled_for = benches.compiled_for
        monkeypatch.setattr(module, "compiled_for", lambda _, f=compiled_for: f(Bench(True, 0.0)))
    return Imitated(False, time.monotonic() + 60)


def test_times_are_medians_of_interleaved_events(imitated: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Imitated, "pick", Bench.pick)
    order: list[str] = []
    assert imitated.times({name: lambda n=name: order.append(n) for name in ("a", "b")}) == {"a": 2.0, "b": 2.0}
    assert len(order) == 50 and order[:4] == ["a", "b", "b", "a"]
    clock = Clock(is_dry=False)
    for _ in range(3):
        clock.mark()
    assert clock.milliseconds() == [2.0, 2.0]
    assert imitated.peak(lambda: None) == 20


def test_what_a_gpu_alone_runs_is_written_correctly(imitated: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: list(check(imitated)) for name, check in {
        "machine": machine.machine, "refresh": kernels.refresh, "update": kernels.update,
        "masked": kernels.masked_linear, "loss": losses.loss_speed,
    }.items()}  # fmt: skip
    device = found["machine"][0]["measured"]
    assert (device["capability"], device["start_method"]) == ("9.0", "forkserver")
    waits = found["refresh"][-1]
    assert waits["verdict"] == "met" and waits["measured"]["of"][0].startswith("bench.py:")
    assert [line["verdict"] for line in found["update"]] == ["met", "met", "met"]
    assert found["masked"][-1]["measured"]["bytes"]["ours"] == 20
    peak = found["loss"][-1]
    assert peak["measured"]["ratio"] == 1.0 and peak["verdict"] == "met"
    (absent,) = steps._semi_structured_products(imitated)
    assert absent["measured"] == {"absent": "no such product here"}
    with cpu_cusparselt(monkeypatch):
        assert [line["verdict"] for line in steps._semi_structured_products(imitated)] == ["met", "info"]


def test_a_peak_is_measured_without_old_gradients(imitated: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    grads: list[Any] = []

    def peak(self: Bench, call: Any) -> int:
        layer, x, _ = call.args
        grads.extend((layer.weight.grad, x.grad))
        call()
        return 1

    monkeypatch.setattr(Imitated, "peak", peak)
    measured = list(kernels.masked_linear(imitated))[-1]["measured"]
    assert grads == [None] * 8
    assert measured["kept_copy"] == 16 * 32 * 2 and measured["bytes"]["made"] == 1


def test_a_change_of_basis_that_is_wrong_or_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter((0.1, 0.102))  # on the CPU, and the first way

    def changed(home: torch.device, device: torch.device | None) -> BasisReport:
        return BasisReport(Pattern(2, 4), 32, shares={"before": next(shares)})

    monkeypatch.setattr(basis, "_changed", changed)
    assert [line["verdict"] for line in basis.basis(Bench(True, 0.0))] == ["wrong", "failed"]


def test_what_steps_on_a_gpu_give_is_compared(imitated: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_child(self: Bench, function: Any, *args: Any) -> dict[str, Any]:
        if function is steps._planned:
            return {"total": 27, "moment": "update", "items": {}}
        if function is cusparselt.fault:
            return None
        size = 100 if function is not steps.ours else 27 if args[-1] == "on" else 30
        return dict(milliseconds=size, allocated=size, reserved=36, outside=steps.GIB, loss=1.0, profile={"top": []})

    monkeypatch.setattr(Bench, "in_child", in_child)
    imitated.rates = {"product": 1e6}
    time_, memory, _, rate, *others = steps.whole_step(imitated)  # asks for no GPU in this process
    semi_structured = {line["case"].split(", ")[-1]: line for line in others if "forward" in line["case"]}
    assert semi_structured["time"]["measured"]["ratio"] == 0.9 and semi_structured["mean loss"]["verdict"] == "met"
    assert (time_["measured"]["ratio"], memory["measured"]["ratio"]) == (0.3, 0.3) and memory["verdict"] == "met"
    # 2 layers of 2·32² + 2·32·16 + 3·32·48 weights, and the head of 32·128; 4 passes of 2 FLOP; 32 tokens in 30 ms
    flops = 4 * 2 * (2 * 7680 + 4096) * 32 / 0.03
    assert rate["measured"]["share_of_product_rate"]["ours"] == pytest.approx(flops / 1e6, rel=1e-4)
    verdicts = [(line["measured"]["ratio"], line["verdict"]) for line in steps.memory(imitated)]
    assert verdicts == [(0.9, "met"), (1.2, "missed"), (1.0, "met")]


def test_compiled_steps_are_compared_with_eager_ones_which_run_first(
    imitated: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[bool] = []

    def in_child(self: Bench, function: Any, *args: Any) -> dict[str, Any]:
        order.append(args[-1])
        size = 30 if args[-1] else 100
        return dict(milliseconds=size, allocated=size, loss=1.0, breaks={}, fp32_precision="none", profile={"top": []})

    monkeypatch.setattr(Bench, "in_child", in_child)
    verdicts = [line["verdict"] for line in steps.compiled_step(imitated)]
    assert order == [False, True] and verdicts == [*["met"] * 5, "info"]


def test_a_watch_on_a_gpu_counts_times_kernels_and_waits(imitated: Bench) -> None:
    watch = steps.Watch(False, 1, 2, 1)
    for _ in range(5):
        watch.on_step_end()
    found = watch.found()
    assert found["milliseconds"] == 2.0 and found["profile"]["a_step"] == {"milliseconds": 0, "kernels": 0}
    assert sum(found["profile"]["waits"].values()) == 1
    assert steps._memory(False) == {"allocated": 30, "reserved": 50, "outside": 60}


def test_copies_and_named_regions_are_no_kernels() -> None:
    kinds = torch.autograd.DeviceType
    rows = [("k", kinds.CUDA, False), ("Memcpy HtoD", kinds.CUDA, False), ("step", kinds.CUDA, True),
            ("aten::mm", kinds.CPU, False)]  # fmt: skip
    events = [SimpleNamespace(key=key, device_type=kind, is_user_annotation=region) for key, kind, region in rows]
    assert [event.key for event in launched(events)] == ["k"]
