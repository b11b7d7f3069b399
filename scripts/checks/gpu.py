"""Is everything right on this GPU, and how fast is it? One command, under nine minutes.

    python scripts/checks/gpu.py [--seconds 520] [--only NAME] [--out FILE] [--dry]

Random weights, fixed seeds, no network, no model files. Each check runs in a process of its own, the most useful first.
Standard output has a JSON line at once for each case (check, case, measured, expected, verdict), then a summary.
Everything else, such as the logs of training, is on standard error.

Verdicts:
    met      as expected
    missed   right, but a time, a size or a count is above its goal
    wrong    a result is not as expected
    failed   an error, a crash, or too slow
    skipped  not run; the reason is there
    info     nothing is expected
    dry      a time or a size without a GPU, which means nothing
The exit code is 1 if anything is wrong or failed, otherwise 0.

Times: CUDA events, 5 warm-ups, 20 interleaved pairs, medians, an emptied L2 cache where it matters. Needs torch >= 2.11
for CUDA, triton, transformers, accelerate, and datasets for the checks that train; what is missing is named, and its
checks are skipped. liger_kernel is compared with if it is there.

`--dry` runs everything at tiny sizes without a GPU: Triton in its interpreter, gloo instead of NCCL.

scripts/checks/README.md has the list of checks, and says how to add what a machine gave to the repository.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "scripts.checks.gpu_checks"
BASE = ("torch", "triton")
MODELS = (*BASE, "transformers")
TRAINING = (*MODELS, "accelerate", "datasets")
OWN_SHARE = 0.9  # of its time, after which a check begins nothing more, so that it ends by itself
BY_WEIGHT = ("wrong", "failed", "missed", "skipped")  # verdicts that are not as expected


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        number: in the table of the README.
        where: file and function in `gpu_checks`.
        needs: packages without which it is skipped.
        seconds: after which it is stopped.
    """

    number: int
    name: str
    where: str
    needs: tuple[str, ...] = MODELS
    seconds: float = 90.0

    @property
    def function(self) -> Any:
        """The generator of its lines."""
        file, name = self.where.split(".")
        return getattr(importlib.import_module(f"{FOLDER}.{file}"), name)


CHECKS = (  # by worth: what comes last is skipped first
    Check(0, "machine", "machine.machine", BASE, 60),
    Check(6, "masked linear", "kernels.masked_linear"),
    Check(7, "loss", "losses.loss_speed", MODELS, 120),
    Check(8, "step", "steps.whole_step", TRAINING, 200),
    Check(1, "fsdp2", "runs.fsdp2", TRAINING, 150),
    Check(2, "masks and updates", "kernels.masks_and_updates", MODELS, 120),
    Check(3, "parity", "losses.parity"),
    Check(4, "refresh", "kernels.refresh"),
    Check(5, "update", "kernels.update"),
    Check(13, "compiled step", "steps.compiled_step", TRAINING, 200),
    Check(9, "memory", "steps.memory", TRAINING, 120),
    Check(14, "basis", "basis.basis", MODELS, 60),
    Check(10, "resume", "runs.resume", TRAINING, 150),
    Check(12, "ddp", "runs.ddp", TRAINING, 120),
    Check(11, "linear24", "linear24.linear24", BASE, 180),
)


def main() -> int:
    """The command line."""
    started = time.monotonic()  # looking for a GPU imports torch, which takes a minute on a cold disk
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU must not start CUDA before a fork
    options = _options()
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    multiprocessing.set_forkserver_preload([f"{FOLDER}.preloaded"])
    deadline = started + options.seconds
    with Output(options.out, about(options.commit, options.dry)) as output:
        run(options, deadline, output)
        output.write_summary()
    return 1 if output.is_bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=520.0, help="After this (520) the rest is skipped by name.")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        choices=[check.name for check in CHECKS],
        help=f"Only this check; may be given several times: {', '.join(check.name for check in CHECKS)}.",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="Append the lines there, with device and versions.")
    parser.add_argument("--commit", help="For --out, where git cannot say it.")
    parser.add_argument("--dry", action="store_true", help="Tiny sizes, without a GPU.")
    options = parser.parse_args()
    if not options.dry and not _has_gpu():
        parser.error("There is no GPU here. --dry runs the same without one.")
    return options


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def about(commit: str | None, is_dry: bool) -> dict[str, Any]:
    """Device, driver, versions, commit."""
    from scripts.provenance import commit_of

    names = (*TRAINING, "peft", "liger_kernel")
    device = "CPU, dry" if is_dry else _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "commit": commit or commit_of(ROOT),
        "device": device,
        "python": sys.version.split()[0],
        "versions": {name: version for name in names if (version := _version(name)) is not None},
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(options: argparse.Namespace, deadline: float, output: "Output") -> None:
    """Run the checks, each until its own limit or the deadline."""
    from scripts.checks.gpu_checks.bench import Bench

    bench = Bench(options.dry, deadline)
    if time.monotonic() < deadline:
        bench.choose_method()
    for check in CHECKS:
        if options.only and check.name not in options.only:
            continue
        if time.monotonic() >= deadline:
            output.write(check, {"verdict": "skipped", "reason": "out of time"})
            continue
        started = time.monotonic()
        for line in lines_of(check, bench):
            output.write(check, line)
            if check.name == "machine" and "rate" in line.get("measured", {}):
                bench.rates[line["case"]] = line["measured"]["rate"]
        output.seconds[check.name] = time.monotonic() - started


def lines_of(check: Check, bench: Any) -> Iterator[dict[str, Any]]:
    """The lines of a check as they come; its process is ended at its limit, or at the deadline."""
    from scripts.checks.gpu_checks.bench import Child, ChildError

    started, seconds = time.monotonic(), bench.pick(check.seconds, 10 * check.seconds)
    limit = started + seconds
    own = replace(bench, deadline=started + OWN_SHARE * (min(limit, bench.deadline) - started))
    # a training step takes seconds in Triton's interpreter
    plain = {"AST_SPARSE_GPU": "plain"} if bench.is_dry and check.needs == TRAINING else {}
    child = Child(bench.method, _lines, check, own, environment=plain)
    try:
        while True:
            kind, value = child.next(min(limit, bench.deadline))
            if kind != "line":
                break
            yield value
        if kind == "error":
            yield {"verdict": "failed", "reason": value}
    except TimeoutError:
        is_own = limit < bench.deadline
        reason = f"stopped after {check.seconds:.0f} s" if is_own else "out of time"
        yield {"verdict": "failed" if is_own else "skipped", "reason": reason}
        child.process.kill()
    except ChildError as error:
        yield {"verdict": "failed", "reason": str(error)}
    finally:
        child.end()


def _lines(check: Check, bench: Any) -> Iterator[dict[str, Any]]:
    for name in check.needs:
        try:
            importlib.import_module(name)
        except ImportError as error:
            yield {"verdict": "skipped", "reason": f"{name} cannot be imported: {error}"[:300]}
            return
    yield from check.function(bench)


class Output:
    """Standard output, the file of `--out`, and what the summary says.

    Attributes:
        is_bad: whether a line is wrong or failed.
        seconds: of each check.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self._path, self._about = path, about
        self._file: TextIO | None = None
        self._verdicts: dict[str, list[str]] = {}
        self._shown: dict[str, list[str]] = {verdict: [] for verdict in BY_WEIGHT}
        self.is_bad, self.seconds = False, dict[str, float]()

    def __enter__(self) -> "Output":
        self._file = None if self._path is None else self._path.open("a", encoding="utf-8")
        print(json.dumps({"about": self._about}), flush=True)
        return self

    def __exit__(self, *args: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, check: Check, line: dict[str, Any]) -> None:
        """Print a line, and append it to the file."""
        line = {"check": check.name, "number": check.number, **line}
        print(json.dumps(line), flush=True)
        if self._file is not None:
            self._file.write(json.dumps({**line, **self._about}) + "\n")
            self._file.flush()
        verdict = line["verdict"]
        self._verdicts.setdefault(check.name, []).append(verdict)
        if verdict in BY_WEIGHT:
            what = line.get("reason") or f"{line.get('measured')}, expected {line.get('expected')}"
            self._shown[verdict].append(f"{verdict:7}  {check.name}, {line.get('case', 'all of it')}: {what}"[:300])
        self.is_bad |= verdict in ("wrong", "failed")

    def write_summary(self) -> None:
        """A line for each check, then what is not as expected, the worst first, and how many of each there are."""
        for check in CHECKS:
            if verdicts := self._verdicts.get(check.name):
                counts = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))
                print(f"{check.number:3}  {check.name:18} {self.seconds.get(check.name, 0):6.1f} s  {counts}")
        for line in itertools.chain.from_iterable(self._shown.values()):
            print(line)
        found = ", ".join(f"{len(lines)} {verdict}" for verdict, lines in self._shown.items())
        is_dry = any("dry" in verdicts for verdicts in self._verdicts.values())
        print(f"{found}.{' Times and sizes were not measured.' if is_dry else ''}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
