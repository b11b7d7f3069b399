"""The check of the 2:4 kernels on a GPU, on tiny shapes in Triton's interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.checks import gpu_linear24

SCRIPT = Path(gpu_linear24.__file__)
NAMES = [name for name, _ in gpu_linear24.checks(gpu_linear24.Bench(is_dry=True))]


ABSENT = ("accelerate", "click", "datasets", "huggingface_hub", "peft", "safetensors", "transformers", "yaml")


def test_every_check_runs_and_is_right() -> None:
    """As on a machine that has torch and triton only."""
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({ABSENT})); sys.argv = sys.argv[1:];"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(SCRIPT), "--dry", "--seconds", "600"]
    done = subprocess.run(command, capture_output=True, text=True)
    about, *lines, last = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and last == {"all_right": True} and about["about"]["torch"] == torch.__version__
    assert [line["check"] for line in lines if "seconds" in line] == NAMES
    assert not [line for line in lines if "failed" in line or "skipped" in line]
    assert any(line.get("right") for line in lines) and any("times_faster" in line for line in lines)


def test_checks_are_named_and_skipped_once_time_is_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # `--dry` sets it
    monkeypatch.setattr(sys, "argv", ["gpu_linear24.py", "--dry", "--seconds", "0"])
    assert gpu_linear24.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:-1] == [{"check": name, "skipped": "out of time"} for name in NAMES]


def test_an_error_beyond_rounding_is_wrong() -> None:
    expected = torch.ones(4, dtype=torch.float64)
    right = gpu_linear24.compared(torch.tensor([1, 1 + 2**-8, 1, 1]).bfloat16(), expected, 64)
    assert (
        right["right"]
        and not gpu_linear24.compared(torch.tensor([1, 1 + 2**-6, 1, 1]).bfloat16(), expected, 64)["right"]
    )
    assert not gpu_linear24.compared(torch.tensor([1, torch.nan, 1, 1]).bfloat16(), expected, 64)["right"]


def test_without_a_gpu_it_says_how_to_run_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_linear24.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_linear24.main()
    assert stopped.value.code == 2 and "--dry" in capsys.readouterr().err
