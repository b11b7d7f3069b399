"""Engines for `scripts/checks/serving.py`: vLLM behind HTTP, and vLLM in a process.

    python scripts/checks/serving_engines.py MODEL OUT [eager]    # bfloat16, plain products: log-probabilities as JSON

In the command, each dense layer is a call of `F.linear`. vLLM's own products pack the weights for oneDNN and add in
another order, and no option turns that off.
"""

import json
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

from scripts.checks.serving_models import PROMPTS, TOKENS

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
        llm = LLM(model=str(model), max_model_len=128, max_num_seqs=4, **{"enforce_eager": True, **settings})
        return action(llm)
    finally:
        del llm
        cleanup_dist_env_and_memory()


def use_plain_products() -> None:
    """Make vLLM's dense layers call `F.linear`, in an operation that compilers see as one node, as the plug-in's is."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from vllm.model_executor.layers import utils

    @torch.library.custom_op("ast_sparse_check::linear", mutates_args=())
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @linear.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


def log_probabilities(llm: Any) -> list[list[dict[int, float]]]:
    """Of the five likeliest tokens at each place of the greedy answers."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
    settings = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=5)
    answers = [each.outputs[0] for each in llm.generate(prompts, settings, use_tqdm=False)]
    return [[{token: of.logprob for token, of in place.items()} for place in each.logprobs] for each in answers]


def main(model: Path, out: Path, *mode: str) -> None:
    """Write the log-probabilities of one engine in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    use_plain_products()
    found = in_engine(model, log_probabilities, dtype="bfloat16", enforce_eager=mode == ("eager",))
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
