"""How close is the memory that `ast-train --dry-run` plans to what runs take? Short runs on this machine's CPU.

Runs in one process: `ast-train` trains MODEL. Measured: the most memory that was resident (VmHWM), less what was
resident once Python and the libraries were loaded. Planned: the total of the dry run. MALLOC_MMAP_THRESHOLD_, which is
set here, makes glibc's malloc return freed blocks, which would otherwise be measured too.

Runs in several processes: a random LLaMA of 15 million parameters with a small tokenizer. Measured: the most that
PyTorch's allocator had given out in one process from the start of training to its end, as it would on a GPU. Planned:
the largest of the moments of training.

    python scripts/checks/plan.py MODEL TEXT [RUN ...]    # SmolLM2-135M as .gguf; JSONL with a `text` key; minutes
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 (here, so that it is not measured)
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from ast_sparse.config import RunConfig, load_config
from ast_sparse.peak import highest_resident_bytes, resident_bytes
from ast_sparse.planning.plan import Hardware
from ast_sparse.run.checks import checked_run
from ast_sparse.run.dry_run import planned_setup
from ast_sparse.run.signals import PreemptionSignals
from ast_sparse.run.train import run_training
from ast_sparse.storage.locate import load_tokenizer
from ast_sparse.tables import format_table
from ast_sparse.training.trainer import SparseTrainer

CONFIG = """
model: {{name_or_path: {model}}}
data: {{train: {text}, eval_share: 0, block_size: 256}}
sparsity: {{mask_interval: 2, kernels: eager}} # compiling takes longer than two steps
training: {{max_steps: 2, per_device_train_batch_size: 1, learning_rate: 1e-4, use_cpu: true, save_strategy: "no",
  report_to: none, disable_tqdm: true, dataloader_pin_memory: false}}
evaluation: {{datasets: []}}
"""
GPT2 = "model={name_or_path: FOLDER, random_weights: true}"
RUNS = {
    "1 x 256": [],
    "2 x 256": ["training.per_device_train_batch_size=2"],
    "2 x 256, checkpointing": ["training.per_device_train_batch_size=2", "training.gradient_checkpointing=true"],
    "1 x 256, no teacher": ["distillation=null"],
    "1 x 256, SLoRB": ["slorb.k=16"],
    "1 x 128, accumulated": ["data.block_size=128", "training.gradient_accumulation_steps=2"],
    "GPT-2, 1 x 512, no teacher": [GPT2, "distillation=null", "data.block_size=512"],
    "GPT-2, 1 x 512, checkpointing": [GPT2, "distillation=null", "data.block_size=512",
                                      "training.gradient_checkpointing=true"],
}  # fmt: skip
FSDP2, ACCUMULATED = "training.fsdp=true", "training.gradient_accumulation_steps=2"
RECOMPUTED = "training.fsdp_config.activation_checkpointing=true"
WHOLE = "training.accelerator_config.gradient_accumulation_kwargs.sync_each_batch=false"
HYBRID = "training.parallelism_config={dp_replicate_size: 2, dp_shard_size: 2}"
SEVERAL = {  # processes and settings
    "2, sharded": (2, [FSDP2]),
    "2, sharded, accumulated": (2, [FSDP2, ACCUMULATED]),
    "2, sharded, accumulated, whole gradients": (2, [FSDP2, ACCUMULATED, WHOLE]),
    "2, sharded, bf16, checkpointing": (2, [FSDP2, "training.bf16=true", RECOMPUTED]),
    "2, sharded, SLoRB, evaluated": (2, [FSDP2, "slorb.k=16", "training.eval_on_start=true", "data.eval_share=0.1"]),
    "2, DDP": (2, []),
    "2, DDP, accumulated": (2, [ACCUMULATED]),
    "4, sharded 2 x 2": (4, [FSDP2, HYBRID]),
    "4, sharded 2 x 2, accumulated": (4, [FSDP2, HYBRID, ACCUMULATED]),
}
SMALL = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, vocab_size=2048)


class Forked:
    """Does work in new processes that have all modules of this one, which are imported once for all runs."""

    def __init__(self) -> None:
        self.fork = multiprocessing.get_context("fork")

    def __call__(self, work: Callable[[], float], processes: int = 1) -> float:
        """The largest result of the processes."""
        results, port = self.fork.SimpleQueue(), free_port()
        started = [
            self.fork.Process(target=self._child, args=(work, results, rank, processes, port))
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            sys.exit("A run failed; its last lines are above.")
        return max(results.get() for _ in started)

    def _child(self, work: Callable[[], float], results: Any, rank: int, processes: int, port: int) -> None:
        if processes > 1:
            names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_PORT=port)
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
        results.put(work())


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def resident(config: RunConfig, out: Path) -> float:
    """MiB that were resident at most during a run, less those before it."""
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    run_training(config, output_dir=str(out), echo=no_echo)
    return (highest_resident_bytes() - before) / 2**20


def given_out(config: RunConfig, out: Path) -> float:
    """MiB that PyTorch's allocator had given out at most between the start and the end of training."""
    times, train = [], SparseTrainer.train

    def timed(*args: Any, **options: Any) -> Any:
        times.append(time.time_ns())
        result = train(*args, **options)
        times.append(time.time_ns())
        return result

    SparseTrainer.train = timed  # type: ignore[method-assign]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_training(config, output_dir=str(out), echo=no_echo)
    now = peak = 0
    events: Any = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        if times[0] <= event.start_ns() <= times[1]:
            peak = max(peak, now)
    return peak / 2**20


def planned(config: RunConfig, out: Path, processes: int, named: Path) -> float:
    """MiB of the dry run, in several processes without saving; the moment of the peak is written to `named`."""
    run = checked_run(config, str(out), None, False, True, Hardware(world_size=processes), no_echo, PreemptionSignals())
    assert run is not None and run.plan.memory is not None
    moments = run.plan.memory.moments(planned_setup(run, processes))
    totals = {name: sum(term.size for term in terms.values()) for name, terms in moments.items()}
    if processes > 1:
        totals.pop("saving of the trained model", None)
    name = max(totals, key=lambda name: totals[name])
    named.write_text(name)
    return totals[name] / 2**20


def no_echo(text: str) -> None: ...


def save_small(tokenizer: Any, text: Path, folder: Path) -> None:
    """A random LLaMA; in float16, so that what reads it makes tensors of its own, which the allocator sees."""
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokenizer = tokenizer.train_new_from_iterator(rows[:100], SMALL["vocab_size"])
    LlamaForCausalLM(LlamaConfig(**SMALL)).half().save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)


def main(model: str, text: str, names: list[str]) -> None:
    rows = []
    if unknown := set(names) - RUNS.keys() - SEVERAL.keys():
        choices = ", ".join(map(repr, [*RUNS, *SEVERAL]))
        sys.exit(f"There is no run {unknown.pop()!r}. Choose from {choices}.")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(CONFIG.format(model=Path(model).absolute(), text=Path(text).absolute()))
        gpt2, small = Path(folder) / "gpt2", Path(folder) / "small"
        gpt2.mkdir()
        tokenizer = load_tokenizer(model)
        tokenizer.save_pretrained(gpt2)
        save_small(tokenizer, Path(text), small)
        dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50257, **dropout}))
        forked, moment = Forked(), Path(folder) / "moment"
        for number, name in enumerate(names or [*RUNS, *SEVERAL]):
            processes, settings = SEVERAL.get(name) or (1, RUNS[name])
            settings = [setting.replace("FOLDER", str(gpt2)) for setting in settings]
            settings += [f"model.name_or_path={small}", "data.block_size=128"] if processes > 1 else []
            settled, out = load_config(str(config), settings), Path(folder) / str(number)
            expected = forked(partial(planned, settled, out, processes, moment))
            measured = forked(partial(resident if processes == 1 else given_out, settled, out), processes)
            rows.append([name, f"{expected:.0f}", f"{measured:.0f}", f"{expected / measured:.2f}", moment.read_text()])
            print(*rows[-1], sep="  ", flush=True)
    print(format_table(["run", "planned MiB", "measured MiB", "ratio", "planned for"], rows))


if __name__ == "__main__":
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # it is read once, when a process begins
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("names", metavar="RUN", nargs="*")
    main(**vars(parser.parse_args()))
