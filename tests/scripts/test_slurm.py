"""scripts/slurm.sh with a fake Slurm: what each task runs, and which exit codes put the job back in the queue."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sh"
JOB = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4"}
FAKES = {
    "scontrol": 'if [ "$1" = show ]; then printf "gpu1\\ngpu2\\n"; else echo "$*" >>requeued; fi',
    # runs the command for all four tasks, and returns the highest exit code, as srun does
    "srun": """
        while [[ $1 == --* ]]; do echo "$1" >>srun_options; shift; done
        code=0
        for task in 0 1 2 3; do
            SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" || { last=$?; code=$((last > code ? last : code)); }
        done
        exit $code
    """,
    "ast-train": """
        for name in RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS \\
            PYTORCH_ALLOC_CONF; do echo "$name=${!name}" >>"env$RANK"; done
        printf '%s\\n' "$@" >"arguments$RANK"
        exit $((RANK == 2 ? EXIT : 0))
    """,
}


def job(folder: Path, *arguments: str, exit_code: int = 0, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the script as a job of 2 nodes x 2 tasks; the fakes write what they were given into the folder."""
    programs = folder / "bin"
    programs.mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF")}
    path = f"{programs}:{os.environ['PATH']}"
    variables = {**kept, **JOB, "PATH": path, "EXIT": str(exit_code), "SLURM_CPUS_PER_TASK": "6", **environment}
    return subprocess.run(["bash", SCRIPT, *arguments], cwd=folder, env=variables, capture_output=True, text=True)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_every_task_is_a_rank_and_gets_the_arguments_as_they_are(tmp_path: Path) -> None:
    done = job(tmp_path, "--config", "a file.yaml", "--output-dir=out", "--set", "data.train=[a, b]")
    assert done.returncode == 0, done.stderr
    for rank in range(4):
        given = ["--resume-if-started", "--config", "a file.yaml", "--output-dir=out", "--set", "data.train=[a, b]"]
        assert lines(tmp_path / f"arguments{rank}") == given
        assert lines(tmp_path / f"env{rank}") == [
            f"RANK={rank}", f"LOCAL_RANK={rank % 2}", "WORLD_SIZE=4", "LOCAL_WORLD_SIZE=2", "MASTER_ADDR=gpu1",
            "MASTER_PORT=10007", "OMP_NUM_THREADS=6", "PYTORCH_ALLOC_CONF=expandable_segments:True",
        ]  # fmt: skip


def test_srun_is_told_the_cores_of_a_task_and_does_not_kill_ranks_that_save(tmp_path: Path) -> None:
    job(tmp_path)
    expected = {"--cpus-per-task=6", "--distribution=block", "--kill-on-bad-exit=0", "--wait=60"}
    assert set(lines(tmp_path / "srun_options")) == expected


def test_threads_and_allocator_of_the_user_stay(tmp_path: Path) -> None:
    job(tmp_path, OMP_NUM_THREADS="3", PYTORCH_ALLOC_CONF="backend:native")
    assert lines(tmp_path / "env0")[-2:] == ["OMP_NUM_THREADS=3", "PYTORCH_ALLOC_CONF=backend:native"]


@pytest.mark.parametrize("restarts", ["0", "99"])
def test_a_run_that_can_be_continued_is_put_back_in_the_queue(tmp_path: Path, restarts: str) -> None:
    assert job(tmp_path, exit_code=75, SLURM_RESTART_COUNT=restarts).returncode == 0
    assert lines(tmp_path / "requeued") == ["requeue 20007"]


@pytest.mark.parametrize("code", [0, 1, 2, 137], ids=["finished", "failed", "wrong settings", "killed"])
def test_no_other_exit_code_puts_it_back_and_the_job_ends_with_it(tmp_path: Path, code: int) -> None:
    assert job(tmp_path, exit_code=code).returncode == code
    assert not lines(tmp_path / "requeued")


def test_after_a_hundred_restarts_it_is_left(tmp_path: Path) -> None:
    done = job(tmp_path, exit_code=75, SLURM_RESTART_COUNT="100")
    assert done.returncode == 75 and "Not queued again after 100 restarts" in done.stderr
    assert not lines(tmp_path / "requeued")
