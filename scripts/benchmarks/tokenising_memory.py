"""Does the memory of `ast-data prepare` stay flat?

The peak of all processes of the command (private pages, sampled five times a second) on 1 GB of text, against that on a
quarter of it, which still is several shards. Text and tokenizer are those of `tokenising`.
The rate is per CPU second, so that other work on the machine does not count.
"""

import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ast_sparse.data.tokens.shards import read_manifest
from scripts.benchmarks.harness import Result, Settings, main
from scripts.benchmarks.tokenising import command, processes, write_model, write_text


def measure(settings: Settings) -> Iterator[Result]:
    sizes, workers = ((1, 2) if settings.quick else (256, 1024)), processes(settings)  # MB of text
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", 2_000 if settings.quick else 32_000)
        peaks, rates = [], {}
        for run, size in enumerate(sizes):
            text = write_text(folder / f"{size}.jsonl", size * 10**6)
            peak, seconds = measured(command(folder, text, run, workers))
            tokens = read_manifest(folder / f"shards-{run}").tokens
            peaks.append(peak / 1e6)
            rates[f"{size} MB"] = (
                f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens and {size / seconds:.2f} MB per CPU second"
            )
        yield Result.of(
            [peaks[1]], [peaks[0]], question="memory of tokenising", unit="MB", goal=1.1,
            case=f"{sizes[1]:,} MB, {workers} processes", against=f"the same on {sizes[0]} MB", notes=rates,
        )  # fmt: skip


def measured(arguments: list[str]) -> tuple[int, float]:
    """Peak of the private memory of all processes of a command, in bytes, and their CPU seconds."""
    before = cpu_seconds()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = [0]
    watch = threading.Thread(target=watch_memory, args=(psutil.Process(process.pid), peak))
    watch.start()
    if process.wait():
        raise RuntimeError(f"ast-data prepare ended with {process.returncode}")
    watch.join()
    return peak[0], cpu_seconds() - before


def cpu_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def watch_memory(root: psutil.Process, peak: list[int]) -> None:
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        total = 0
        for process in [root, *root.children(recursive=True)]:
            try:
                total += process.memory_full_info().uss
            except psutil.Error:  # it has ended
                continue
        peak[0] = max(peak[0], total)
        time.sleep(0.2)


if __name__ == "__main__":
    main(measure)
