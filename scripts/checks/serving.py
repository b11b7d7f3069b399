"""The cases of `scripts/checks/vllm.sh`: what vLLM does with compressed exports, beside what it should do.

    python scripts/checks/serving.py WORK [EXPORTS]    # exit code 1 if a case fails

WORK was written by `scripts/checks/serving_models.py`; EXPORTS holds `compressed/` and `dense/` of one model.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import typing
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.checks.serving_models import FAMILIES, PROMPTS, TOKENS

TIE = 0.13  # in log-probabilities: the step of bfloat16 logits between 16 and 32 is 0.125
READY = 900  # seconds until a server must answer
BOTH_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2])}
SLORB = ("--hf-overrides", '{"ast_sparse_slorb": true}')
REFUSED = {
    "gpt2": "is a gpt2 model, whose compressed Conv1D layers vLLM would transpose",
    "mixtral": "is a mixtral model, whose experts a compressed export stores under names that vLLM does not read",
    "damaged": "does not have the checksum it was written with",
    "newer": "format_version 2, newer than 1",
    "partly": "self_attn.q_proj` is compressed and `model.layers.0.self_attn.k_proj` is not",
    "unbuilt": "has `model.layers.7.mlp.up_proj` compressed, but the engine builds no such layer",
}


class Table:
    """What was checked, printed as it comes."""

    def __init__(self) -> None:
        self.failed = 0

    def row(self, case: str, passed: bool, note: str = "") -> None:
        self.failed += not passed
        print(f"{'passed' if passed else 'FAILED':8}{case:58}{note}", flush=True)


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


def answers(client: Any, model: str = "base") -> list[Any]:
    """The greedy answers to the prompts, over HTTP, with the five likeliest tokens at each place."""
    asked: dict[str, Any] = dict(model=model, max_tokens=TOKENS, temperature=0, logprobs=5)
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
    return [client.completions.create(prompt=list(prompt), **asked, extra_body=extra).choices[0] for prompt in PROMPTS]


def served(client: Any, model: str = "base") -> list[list[int]]:
    """The tokens of the answers."""
    return [answer.token_ids for answer in answers(client, model)]


def same(table: Table, case: str, found: list[list[int]], expected: list[list[int]]) -> None:
    """A row: whether every prompt got the expected tokens."""
    pairs = list(zip(found, expected, strict=True))
    equal = sum(first == second for first, second in pairs)
    table.row(case, equal == len(pairs), f"{equal} of {len(pairs)} prompts, {TOKENS} tokens each")


def same_but_ties(table: Table, case: str, found: list[Any], expected: list[Any]) -> None:
    """A row: whether every prompt got the expected tokens, up to a place where the expected run had a tie.

    16-bit logits have few values, so two tokens may be equally likely within rounding.
    """
    ties, wrong = [], 0
    for answer, other in zip(found, expected, strict=True):
        pairs = enumerate(zip(answer.token_ids, other.token_ids, strict=True))
        place = next((place for place, (first, second) in pairs if first != second), None)
        if place is not None:
            likely = other.logprobs.top_logprobs[place]
            gap = max(likely.values()) - likely.get(f"token_id:{answer.token_ids[place]}", -1e9)
            ties.append(gap)
            wrong += gap > TIE
    note = f"{len(found) - len(ties)} of {len(found)} prompts, {TOKENS} tokens each"
    note += f"; first difference where the log-probabilities are {max(ties):.3f} apart" if ties else ""
    table.row(case, not wrong, note)


def check_serving(table: Table, work: Path, exports: Path | None, expected: dict[str, list[list[int]]]) -> None:
    """Everything that is asked over HTTP."""
    tiny = work / "tiny"
    in_float32 = ("--dtype", "float32")
    main, key = (tiny, "tiny") if exports is None else (exports / "compressed", "exports")
    with server(main, *in_float32) as client:
        same(table, "float32, compiled: tokens of transformers", served(client), expected[key])
    lora = ("--enable-lora", "--max-lora-rank", "256", "--lora-modules", f"slorb={tiny / 'slorb'}")
    with server(tiny, *in_float32, "--enforce-eager", *lora) as client:
        same(table, "float32, eager, LoRA on: tokens of transformers", served(client), expected["tiny"])
        same(table, "SLoRB as a LoRA: tokens of PEFT", served(client, "slorb"), expected["tiny+slorb"])
    two = ("--tensor-parallel-size", "2")
    with server(tiny, *in_float32, *two, *SLORB, "--enforce-eager", **BOTH_CORES) as client:
        same(table, "SLoRB in the layers, 2 ranks: tokens of PEFT", served(client), expected["tiny+slorb"])
    with server(tiny, *in_float32, *two, "--enforce-eager", **BOTH_CORES) as client:
        same(table, "float32, 2 ranks: tokens of transformers", served(client), expected["tiny"])
    for mode, options in (("compiled", ()), ("eager", ("--enforce-eager",))):
        found = {}
        for format in ("compressed", "dense"):
            model = work / f"tiny-bf16-{format}" if exports is None else exports / format
            with server(model, "--dtype", "bfloat16", *options) as client:
                found[format] = answers(client)
        same_but_ties(table, f"bfloat16, {mode}: tokens of vLLM's dense export", found["compressed"], found["dense"])


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


def generated(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
    settings = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    return [list(each.outputs[0].token_ids) for each in llm.generate(prompts, settings, use_tqdm=False)]


def check_families(table: Table, work: Path, expected: dict[str, list[list[int]]]) -> None:
    """A tiny random model of each family in float32."""
    for family in FAMILIES:
        try:
            found = in_engine(work / f"family-{family}", generated, dtype="float32")
            same(table, f"{family}: tokens of transformers", found, expected[family])
        except Exception as error:
            table.row(f"{family}: tokens of transformers", False, last_line(error))


def last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def check_memory(table: Table, work: Path) -> None:
    """Bytes of the compressed layers while vLLM runs, beside those of dense bfloat16 weights."""
    model = work / "tiny-bf16-compressed"
    stored, dense = in_engine(model, lambda llm: llm.apply_model(stored_bytes)[0], dtype="bfloat16")
    table.row("memory of the compressed layers", stored == 0.5625 * dense, f"{stored / dense:.4f} of dense bfloat16")


def stored_bytes(model: Any) -> tuple[int, int]:
    layers = [layer for layer in model.modules() if hasattr(layer, "weight_meta")]
    stored = sum(layer.weight.nbytes + layer.weight_meta.nbytes for layer in layers)
    return stored, sum(2 * layer.weight.numel() * layer.weight.element_size() for layer in layers)


def check_refused(table: Table, work: Path) -> None:
    """What the plug-in refuses, and a vLLM without it."""
    for name, message in REFUSED.items():
        table.row(f"refused: {name}", *stops_with(message, work / name))
    code = "import sys; from vllm import EngineArgs; EngineArgs(model=sys.argv[1]).create_engine_config()"
    environment = {**os.environ, "VLLM_PLUGINS": "none"}
    command = [sys.executable, "-c", code, str(work / "tiny")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    message = "Unknown quantization method"
    table.row("refused: without the plug-in", done.returncode != 0 and message in done.stderr, message)


def stops_with(message: str, model: Path) -> tuple[bool, str]:
    try:
        in_engine(model, generated, dtype="float32")
    except Exception as error:
        found = last_line(error)
        return message in found, message if message in found else found
    return False, "it was served"


def check_ranks(table: Table) -> None:
    """The ranks that `ast-export` knows are those that vLLM allows."""
    from vllm.config.lora import MaxLoRARanks

    from ast_sparse.export.vllm_options import VLLM_RANKS

    table.row("ranks that vLLM's LoRA allows", typing.get_args(MaxLoRARanks) == VLLM_RANKS, str(VLLM_RANKS))


def check_call(table: Table) -> None:
    """What a call of the product costs beyond its kernel, on a layer of almost no weights."""
    import torch

    from ast_sparse.kernels.code24 import pack24
    from ast_sparse.kernels.linear24 import linear24

    weight = torch.zeros(8, 64)
    values, meta = pack24(weight)
    x = torch.randn(1, 64)
    with torch.inference_mode():
        direct = microseconds(lambda: linear24(x, values, meta))
        op = microseconds(lambda: torch.ops.ast_sparse.linear24(x, values, meta, None))
        dense = microseconds(lambda: torch.nn.functional.linear(x, weight))
    note = f"{direct:.1f} µs called, {op:.1f} µs as an operation of a graph, {dense:.1f} µs F.linear"
    table.row("a call of an 8 × 64 layer, one token", True, note)


def microseconds(action: Callable[[], Any], calls: int = 2000) -> float:
    for _ in range(100):
        action()
    begin = time.perf_counter()
    for _ in range(calls):
        action()
    return (time.perf_counter() - begin) / calls * 1e6


def main(work: Path, exports: Path | None) -> int:
    """Run all cases; the exit code."""
    table = Table()
    expected = json.loads((work / "expected.json").read_text(encoding="utf-8"))
    check_serving(table, work, exports, expected)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `apply_model` sends a function, here to this process
    check_ranks(table)
    check_call(table)
    check_refused(table, work)
    check_memory(table, work)
    check_families(table, work, expected)
    print(f"{table.failed} cases failed")
    return int(table.failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
