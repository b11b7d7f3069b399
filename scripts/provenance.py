"""What a measured result depends on, in addition to its settings."""

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ("scripts/benchmarks/results", "scripts/studies/results")


def provenance(checkout: Path = ROOT) -> dict[str, Any]:
    """Commit of a checkout, device and versions."""
    import torch  # here, because the commit is also asked for where neither is installed
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return {
        "commit": commit_of(checkout),
        "device": f"{device}, {os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def commit_of(checkout: Path = ROOT) -> str:
    """The commit of a checkout, and whether its code was changed since; what was measured before is no code."""
    code = (":/", *(f":(top,exclude){folder}" for folder in RESULTS))
    commit = _git(checkout, "rev-parse", "--short", "HEAD")
    changed = _git(checkout, "status", "--porcelain", "-uno", "--", *code)
    return (commit or "unknown") + ("+changes" if changed else "")


def _cpu() -> str:
    """Kind and name of this CPU, and whether it has AMX, where products of bfloat16 are many times as fast."""
    kind, file = f"{platform.machine()} CPU", Path("/proc/cpuinfo")
    about = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", about, re.MULTILINE)
    name = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", "", found[1]) if found else ""
    return " ".join(filter(None, [kind, *name.split(), "with AMX" if " amx_bf16" in about else ""]))


def _git(root: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
