"""How close is the memory that `ast-train --dry-run` plans to what runs take? Short runs on this machine's CPU.

Each run is `ast-train` in its own process, or in two. Measured: the most memory that was resident (VmHWM), less what
was resident once Python and the libraries were loaded. Planned: the total of the dry run. MALLOC_MMAP_THRESHOLD_ makes
glibc's malloc return freed blocks, which would otherwise be measured too.

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
SHARDED = "training.fsdp=true"
PROCESSES = 2
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
    "2 processes, sharded, 1 x 256": [SHARDED],
    "2 processes, sharded, 2 x 256, checkpointing": [SHARDED, "training.per_device_train_batch_size=2",
                                                     "training.fsdp_config.activation_checkpointing=true"],
}  # fmt: skip
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


def run(config: Path, out: Path, settings: list[str]) -> int:
    """Bytes that a real run took, or its largest process."""
    child = config.with_name("child.py")
    child.write_text(CHILD)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    command = [sys.executable, *(launch if SHARDED in settings else []), str(child), str(config), str(out), *settings]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return max(int(size) for size in re.findall(r"MEASURED (\d+)", printed))


def plan(config: Path, out: Path, settings: list[str]) -> tuple[float, str]:
    """GiB of the dry run, and the moment of the peak."""
    options = [option for setting in settings for option in ("--set", setting)]
    options += ["--world-size", str(PROCESSES)] if SHARDED in settings else []
    command = [sys.executable, "-m", "ast_sparse.cli.train", "--config", str(config), "--output-dir", str(out),
               "--dry-run", *options]  # fmt: skip
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    moment = re.search(r"at its peak, the (.+):", printed)
    total = re.search(r"\n  total +([\d.]+) GiB", printed)
    assert moment is not None and total is not None, printed
    return float(total[1]), moment[1]


def main(model: str, text: str, names: list[str]) -> None:
    rows = []
    if unknown := set(names) - RUNS.keys():
        sys.exit(f"There is no run {unknown.pop()!r}. Choose from {', '.join(map(repr, RUNS))}.")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        config.write_text(CONFIG.format(model=Path(model).absolute(), text=Path(text).absolute()))
        gpt2 = Path(folder) / "gpt2"
        gpt2.mkdir()
        load_tokenizer(model).save_pretrained(gpt2)
        dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        (gpt2 / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 50257, **dropout}))
        for number, name in enumerate(names or RUNS):
            settings = [setting.replace("FOLDER", str(gpt2)) for setting in RUNS[name]]
            planned, moment = plan(config, Path(folder) / "plan", settings)
            measured = run(config, Path(folder) / str(number), settings) / 2**30
            rows.append([name, f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured:.2f}", moment])
            print(*rows[-1], sep="  ", flush=True)
    print(format_table(["run", "planned GiB", "measured GiB", "ratio", "planned for"], rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("names", metavar="RUN", nargs="*")
    main(**vars(parser.parse_args()))
