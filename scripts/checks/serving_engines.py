"""Engines for `scripts/checks/serving.py`: vLLM behind HTTP, and vLLM in a process."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY = 900  # seconds until a server must answer


@contextmanager
def server(model: Path, *options: str, **environment: str) -> Iterator[Any]:
    """An OpenAI client of vLLM's server; the server and what it started end with the block."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "base", "--max-model-len", "128", "--max-num-seqs", "4"]
    log = Path(f"{model}.log")
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, *options],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        try:
            wait_until_ready(process, port, log)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server answers; RuntimeError with the end of its log if it stops before."""
    end = time.monotonic() + READY
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise RuntimeError("the server did not start:\n" + "\n".join(log.read_text().splitlines()[-15:]))


def in_engine(model: Path, action: Callable[[Any], Any], **settings: Any) -> Any:
    """What `action` returns for a vLLM in this process, which is gone afterwards: there can be one at a time."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(model=str(model), max_model_len=128, max_num_seqs=4, enforce_eager=True, **settings)
        return action(llm)
    finally:
        del llm
        cleanup_dist_env_and_memory()
