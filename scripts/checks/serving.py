"""The cases of `scripts/checks/vllm.sh`: what vLLM does with compressed exports, beside what it should do.

    python scripts/checks/serving.py WORK [EXPORTS]    # exit code 1 if a case fails

WORK was written by `scripts/checks/serving_models.py`; EXPORTS holds `compressed/` and `dense/` of one model.
"""

import json
import os
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from scripts.checks.serving_engines import in_engine, server
from scripts.checks.serving_models import FAMILIES, PROMPTS, TOKENS

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


def answer(client: Any, prompt: Sequence[int], tokens: int = TOKENS, model: str = "base") -> Any:
    """The greedy answer to a prompt, over HTTP, with the twenty likeliest tokens at each place."""
    asked: dict[str, Any] = dict(model=model, max_tokens=tokens, temperature=0, logprobs=20)
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
    return client.completions.create(prompt=list(prompt), **asked, extra_body=extra).choices[0]


def served(client: Any, model: str = "base") -> list[list[int]]:
    """The tokens of the answers to all prompts."""
    return [answer(client, prompt, model=model).token_ids for prompt in PROMPTS]


def with_log_probabilities(client: Any) -> tuple[list[list[int]], list[list[dict[str, float]]]]:
    """The tokens of the answers to all prompts, and the log-probabilities of the likeliest tokens at each place."""
    found = [answer(client, prompt) for prompt in PROMPTS]
    return [each.token_ids for each in found], [each.logprobs.top_logprobs for each in found]


def along(client: Any, tokens: Sequence[Sequence[int]]) -> list[list[dict[str, float]]]:
    """Log-probabilities of the likeliest tokens at each place of given answers, after the given tokens before it.

    The engine decodes by itself; where it would leave the answer, it is asked again with the answer so far.
    """
    found = []
    for prompt, given in zip(PROMPTS, tokens, strict=True):
        places: list[dict[str, float]] = []
        while len(places) < len(given):
            done = answer(client, [*prompt, *given[: len(places)]], len(given) - len(places))
            for token, likely in zip(done.token_ids, done.logprobs.top_logprobs, strict=True):
                places.append(likely)
                if token != given[len(places) - 1]:
                    break
        found.append(places)
    return found


def same(table: Table, case: str, found: list[list[int]], expected: list[list[int]]) -> None:
    """A row: whether every prompt got the expected tokens."""
    pairs = list(zip(found, expected, strict=True))
    equal = sum(first == second for first, second in pairs)
    table.row(case, equal == len(pairs), f"{equal} of {len(pairs)} prompts, {TOKENS} tokens each")


def difference(found: list[list[dict[str, float]]], expected: list[list[dict[str, float]]]) -> float:
    """The largest, in log-probabilities, of the five likeliest tokens that were expected at each place."""
    largest = 0.0
    for places, others in zip(found, expected, strict=True):
        for place, other in zip(places, others, strict=True):
            for token in sorted(other, key=lambda each: other[each])[-5:]:
                likely = place.get(token, min(place.values()))  # not one of twenty: at most as likely as the last
                largest = max(largest, abs(likely - other[token]))
    return largest


def check_bfloat16(table: Table, work: Path, exports: Path | None) -> None:
    """Compressed and dense exports in bfloat16, eager and compiled.

    With AST_SPARSE_CPU=plain both are the same to the bit where vLLM multiplies dense weights by oneDNN. The kernels of
    the plug-in add in another order, and so do those that vLLM has for small weights on a CPU with AMX; then 16-bit
    logits differ. How much they may is measured: no more than the dense run is away from float32, that is, another
    order may not change more than bfloat16 itself does.
    """
    by_onednn = not torch.cpu._is_amx_tile_supported()
    compressed, dense = (
        work / f"tiny-bf16-{of}" if exports is None else exports / of for of in ("compressed", "dense")
    )
    runs = {}
    for mode, options in (("eager", ["--enforce-eager"]), ("compiled", [])):
        in_bfloat16 = ["--dtype", "bfloat16", *options]
        with server(dense, *in_bfloat16) as client:
            tokens, likely = with_log_probabilities(client)
        with server(compressed, *in_bfloat16, AST_SPARSE_CPU="plain") as client:
            if by_onednn:
                equal, note = with_log_probabilities(client) == (tokens, likely), "log-probabilities are the same bits"
                table.row(f"bfloat16, {mode}, plain: vLLM's run of the dense export", equal, note)
            else:
                runs[f"{mode}, plain"] = tokens, likely, along(client, tokens)
        with server(compressed, *in_bfloat16) as client:
            runs[mode] = tokens, likely, along(client, tokens)
    with server(dense, "--dtype", "float32", "--enforce-eager") as client:
        exact = {mode: along(client, tokens) for mode, (tokens, _, _) in runs.items()}
    for mode, (tokens, likely, found) in runs.items():
        apart, error = difference(found, likely), difference(exact[mode], likely)
        agree = sum(
            max(place, key=lambda token: place[token]) == f"token_id:{token}"
            for places, given in zip(found, tokens, strict=True)
            for place, token in zip(places, given, strict=True)
        )
        note = f"{agree} of {sum(map(len, tokens))} next tokens are the same; log-probabilities {apart:.4f} apart, "
        note += f"those of the dense export {error:.4f} from float32, of this one {difference(exact[mode], found):.4f}"
        table.row(f"bfloat16, {mode}: vLLM's run of the dense export", apart <= error, note)


def check_serving(table: Table, work: Path, exports: Path | None, expected: dict[str, list[list[int]]]) -> None:
    """Everything that is asked over HTTP."""
    tiny = work / "tiny"
    in_float32 = ("--dtype", "float32")
    with server(tiny, *in_float32) as client:
        same(table, "float32, compiled: tokens of transformers", served(client), expected["tiny"])
    with server(tiny, *in_float32, *SLORB) as client:  # must not use the graph that was compiled without SLoRB
        same(table, "SLoRB in the layers, compiled: tokens of PEFT", served(client), expected["tiny+slorb"])
    if exports is not None:
        with server(exports / "compressed", *in_float32) as client:
            same(table, "EXPORTS, float32: tokens of transformers", served(client), expected["exports"])
    lora = ("--enable-lora", "--max-lora-rank", "256", "--lora-modules", f"slorb={tiny / 'slorb'}")
    with server(tiny, *in_float32, "--enforce-eager", *lora) as client:
        same(table, "float32, eager, LoRA on: tokens of transformers", served(client), expected["tiny"])
        same(table, "SLoRB as a LoRA: tokens of PEFT", served(client, "slorb"), expected["tiny+slorb"])
    two = ("--tensor-parallel-size", "2")
    with server(tiny, *in_float32, *two, *SLORB, "--enforce-eager", **BOTH_CORES) as client:
        same(table, "SLoRB in the layers, 2 ranks: tokens of PEFT", served(client), expected["tiny+slorb"])
    with server(tiny, *in_float32, *two, "--enforce-eager", **BOTH_CORES) as client:
        same(table, "float32, 2 ranks: tokens of transformers", served(client), expected["tiny"])


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


def check_layers(table: Table, work: Path) -> None:
    """The compressed layers while vLLM runs in bfloat16: their bytes, products, and loading them again."""

    def action(llm: Any) -> list[Any]:
        first = generated(llm)
        found = [llm.apply_model(of)[0] for of in (stored_bytes, largest_error)]
        llm.collective_rpc("reload_weights")
        llm.reset_prefix_cache()
        return [*found, generated(llm) == first]

    (stored, dense), error, again = in_engine(work / "tiny-bf16-compressed", action, dtype="bfloat16")
    table.row("memory of the compressed layers", stored == 0.5625 * dense, f"{stored / dense:.4f} of dense bfloat16")
    table.row("products of the compressed layers", error <= 1, f"{error:.3f} of the error that rounding may cause")
    table.row("the same weights loaded again by reload_weights", again, "the same tokens")


def largest_error(model: Any) -> float:
    """Of the products of all compressed layers with 1 to 40 tokens, against float64: as a share of what one rounding to
    bfloat16, after sums in float32, may cause."""
    import torch

    from ast_sparse.kernels.code24 import unpack24

    largest = 0.0
    for layer in [layer for layer in model.modules() if hasattr(layer, "weight_meta")]:
        weight = unpack24(layer.weight, layer.weight_meta).double()
        for tokens in (1, 4, 16, 40):
            x = torch.randn(tokens, weight.shape[1]).to(layer.weight)
            exact, sums = x.double() @ weight.T, x.double().abs() @ weight.T.abs()
            allowed = exact.abs() * 2**-8 + sums * weight.shape[1] * 2**-23
            error = (layer.quant_method.apply(layer, x).double() - exact).abs()
            largest = max(largest, float((error / allowed).max()))
    return largest


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


def check_plugin(table: Table) -> None:
    """The plug-in is that of this checkout, which `vllm.sh` puts first on the path."""
    import ast_sparse

    first = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    found = {point.name: point for point in entry_points(group="vllm.general_plugins")}["ast_sparse_24"]
    place = Path(str(found.dist.locate_file(""))) if found.dist else None
    table.row("plug-in of this checkout", place == first == Path(ast_sparse.__file__).parent.parent, found.value)


def check_ranks(table: Table) -> None:
    """The ranks that `ast-export` knows are those that vLLM allows."""
    from vllm.config.lora import MaxLoRARanks

    from ast_sparse.export.slorb_hint import VLLM_RANKS

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
    check_plugin(table)
    check_serving(table, work, exports, expected)
    check_bfloat16(table, work, exports)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `apply_model` sends a function, here to this process
    check_ranks(table)
    check_call(table)
    check_refused(table, work)
    check_layers(table, work)
    check_families(table, work, expected)
    print(f"{table.failed} cases failed")
    return int(table.failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
