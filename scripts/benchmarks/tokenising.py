"""How fast does `ast-data prepare` tokenise?

Ours: the command, with as many processes as cores, from JSONL to shards. Alternative: `load_dataset("json")` and
`map(tokenise, batched=True, num_proc=cores)` of `datasets` into its Arrow cache, started in the same way. The text is
that of Python's standard library, repeated with variations; the tokenizer is a byte-level BPE trained on it, with
32,000 tokens.
"""

import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ast_sparse.data.tokens.shards import read_manifest
from scripts.benchmarks.harness import Result, Settings, Spread, interleave, main

ALTERNATIVE = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
if __name__ == "__main__":
    text, model, cache, workers = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = load_dataset("json", data_files=text, split="train", cache_dir=cache)
    rows.map(lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
             batched=True, num_proc=int(workers), remove_columns=["text"])
"""


def measure(settings: Settings) -> Iterator[Result]:
    size, workers = (1 if settings.quick else 32), processes(settings)  # MB of text
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", 2_000 if settings.quick else 32_000)
        text = write_text(folder / "text.jsonl", size * 10**6)
        runs = iter(range(10**6))
        sides = {
            "ours": lambda: prepare(folder, text, next(runs), workers),
            "datasets": lambda: tokenise_with_datasets(folder, text, next(runs), workers),
        }
        times = interleave(sides, settings.pairs(3), warmup=0)
        tokens = read_manifest(folder / "shards-0").tokens
        rates = {side: f"{tokens / Spread.of(taken).median:,.0f} tokens/s" for side, taken in times.items()}
        yield Result.of(
            times["ours"], times["datasets"], question="tokenising text", goal=1.0,
            case=f"{size} MB, {workers} processes", against="datasets.map to Arrow",
            notes={"tokens": tokens, "with the start of the processes": rates},
        )  # fmt: skip


def processes(settings: Settings) -> int:
    """As many as there are cores for this process; one in a quick call, because each takes seconds to start."""
    return 1 if settings.quick else len(os.sched_getaffinity(0))


def write_model(folder: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(library()[:400], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    LlamaConfig().save_pretrained(folder)


def library() -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [part for file in files for part in file.read_text(encoding="utf-8", errors="ignore").split("\n\n\n")]


def write_text(file: Path, size: int) -> Path:
    """Write documents of a few thousand characters, each with its own number, until there are `size` characters."""
    rng, parts, written = random.Random(0), library(), 0
    with file.open("w", encoding="utf-8") as stream:
        while written < size:
            text = f"{rng.random()}\n" + "\n\n\n".join(rng.choices(parts, k=3))
            stream.write(json.dumps({"text": text}) + "\n")
            written += len(text)
    return file


def command(folder: Path, text: Path, run: int, workers: int) -> list[str]:
    out = [str(folder / f"shards-{run}"), str(text), "--tokenizer", str(folder / "model")]
    return [sys.executable, "-m", "ast_sparse.cli.data", "prepare", *out, "--workers", str(workers)]


def prepare(folder: Path, text: Path, run: int, workers: int) -> None:
    arguments = command(folder, text, run, workers)
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def tokenise_with_datasets(folder: Path, text: Path, run: int, workers: int) -> None:
    script = folder / "alternative.py"
    script.write_text(ALTERNATIVE)
    arguments = [str(text), str(folder / "model"), str(folder / f"cache-{run}"), str(workers)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True, env=environment)


if __name__ == "__main__":
    main(measure)
