"""How close is the memory that `ast-train --dry-run` plans to what runs take? Short runs on this machine's CPU.

Runs in one process: `ast-train` trains MODEL. Measured: the most memory that was resident (VmHWM), less what was
resident once Python and the libraries were loaded. Planned: the total of the dry run. MALLOC_MMAP_THRESHOLD_ makes
glibc's malloc return freed blocks, which would otherwise be measured too.

Runs in several processes: a random LLaMA of 30 million parameters with MODEL's tokenizer. Measured: the most that
PyTorch's allocator had given out in one process from the start of training to its end, as it would on a GPU. Planned:
the largest of the moments of training.

    python scripts/checks/plan.py MODEL TEXT [RUN ...]    # SmolLM2-135M as .gguf; JSONL with a `text` key; minutes
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ast_sparse.storage.locate import load_tokenizer
from ast_sparse.tables import format_table

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
FSDP2, ACCUMULATED = "training.fsdp=true", "training.gradient_accumulation_steps=4"
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
SMALL = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=4096)
CHILD = """
import sys
from pathlib import Path
import torch._dynamo
from ast_sparse.config import load_config
from ast_sparse.peak import highest_resident_bytes, resident_bytes
from ast_sparse.run.train import run_training
before = resident_bytes()
Path("/proc/self/clear_refs").write_text("5")
run_training(load_config(sys.argv[1], sys.argv[3:]), output_dir=sys.argv[2])
print("MEASURED", highest_resident_bytes() - before)
"""


COUNTING_CHILD = """
import sys, time
import torch
from torch.profiler import ProfilerActivity, profile
from ast_sparse.config import load_config
from ast_sparse.run.train import run_training
from ast_sparse.training.trainer import SparseTrainer
times, train = [], SparseTrainer.train
def timed(*args, **options):
    times.append(time.time_ns())
    result = train(*args, **options)
    times.append(time.time_ns())
    return result
SparseTrainer.train = timed
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
    run_training(load_config(sys.argv[1], sys.argv[3:]), output_dir=sys.argv[2])
now = peak = 0
events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
for event in sorted(events, key=lambda event: event.start_ns()):
    now += event.nbytes()
    if times[0] <= event.start_ns() <= times[1]:
        peak = max(peak, now)
print("MEASURED", peak)
"""


def run(config: Path, out: Path, settings: list[str], processes: int = 1) -> float:
    """GiB that a real run took, or its largest process."""
    child = config.with_name("child.py")
    child.write_text(CHILD if processes == 1 else COUNTING_CHILD)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(child), str(config), str(out), *settings]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return max(int(size) for size in re.findall(r"MEASURED (\d+)", printed)) / 2**30


def plan(config: Path, out: Path, settings: list[str], processes: int = 1) -> tuple[float, str]:
    """GiB of the dry run, and the moment of the peak; in several processes without that of saving."""
    options = [option for setting in settings for option in ("--set", setting)]
    options += ["--world-size", str(processes)] if processes > 1 else []
    command = [sys.executable, "-m", "ast_sparse.cli.train", "--config", str(config), "--output-dir", str(out),
               "--dry-run", *options]  # fmt: skip
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    moment = re.search(r"at its peak, the (.+):", printed)
    total = re.search(r"\n  total +([\d.]+) GiB", printed)
    assert moment is not None and total is not None, printed
    moments = {moment[1]: float(total[1])}
    others = printed.partition("in all at other moments:\n")[2]
    moments |= {name: float(size) for name, size in re.findall(r"  (\S.*?) {2,}([\d.]+) GiB", others)}
    if processes > 1:
        moments.pop("saving of the trained model", None)
    name = max(moments, key=lambda name: moments[name])
    return moments[name], name


def save_small(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A random LLaMA; in float16, so that what reads it makes tensors of its own, which the allocator sees."""
    vocabulary = max(len(tokenizer), SMALL["vocab_size"])
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": vocabulary}))  # type: ignore[arg-type]
    model.half().save_pretrained(folder)
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
        save_small(tokenizer, small)
        dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50257, **dropout}))
        for number, name in enumerate(names or [*RUNS, *SEVERAL]):
            processes, settings = SEVERAL.get(name) or (1, RUNS[name])
            settings = [setting.replace("FOLDER", str(gpt2)) for setting in settings]
            settings += [f"model.name_or_path={small}"] if processes > 1 else []
            planned, moment = plan(config, Path(folder) / "plan", settings, processes)
            measured = run(config, Path(folder) / str(number), settings, processes)
            rows.append([name, f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured:.2f}", moment])
            print(*rows[-1], sep="  ", flush=True)
    print(format_table(["run", "planned GiB", "measured GiB", "ratio", "planned for"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("names", metavar="RUN", nargs="*")
    main(**vars(parser.parse_args()))
