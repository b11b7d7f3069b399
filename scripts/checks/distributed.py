"""Does training on several processes do what one process does? Tiny models on gloo processes on a CPU.

1. Frozen masks, 30 steps in float64: DDP and FSDP2 on 2 and 4 processes, with and without accumulation and SLoRB,
   compared with one process: the largest difference of a loss.
2. `ast-train` on 2 processes, 60 steps, killed (SIGKILL) at random moments, also during saves, and started again with
   the same command until done: the largest difference of a weight from the uninterrupted run, and the share of zeros in
   the pruned layers. On 4 processes one of them is killed, and every third time all get SIGTERM instead.

    python scripts/checks/distributed.py [--kills 4] [--seed 0]    # minutes on two cores
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from ast_sparse import SLoRBConfig, SparsityConfig
from tests.distributed.fsdp_facts import found, make
from tests.models import generated_text, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]

BATCH, STEPS = 8, 30
CASES = list(itertools.product((1, 2), (False, True)))  # accumulation, SLoRB
CONFIG = """
model: {{name_or_path: {root}/model}}
data: {{train: {root}/text.txt, eval_share: 0.1, block_size: 16}}
sparsity: {{mask_interval: 5, mask_decay: 1e-2, exclude: [up_proj]}}
slorb: {{k: 16}}
training:
  max_steps: 60
  per_device_train_batch_size: 2
  learning_rate: 1e-3
  save_steps: 5
  save_total_limit: 2
  use_cpu: true
  report_to: none
  disable_tqdm: true
evaluation: {{windows: 2}}
"""


def launcher(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def worker(engine: str, out: Path) -> None:
    """Run the cases on the processes that torchrun has started, or on this one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    losses = []
    for accumulation, slorb in CASES:
        run = make(
            out / f"{engine}-{world}-{accumulation}-{slorb}", SparsityConfig(mask_interval=0), world, batch=BATCH,
            slorb=SLoRBConfig(k=16) if slorb else None, gradient_accumulation_steps=accumulation, max_steps=STEPS,
            fsdp=engine == "fsdp2",
        )  # fmt: skip
        run.train()
        losses.append(found(run)["losses"])
    if int(os.environ.get("RANK", "0")) == 0:
        (out / f"{engine}-{world}.json").write_text(json.dumps(losses))


def compare(out: Path) -> bool:
    """The first part; return whether all losses agree to 1e-5."""
    subprocess.run([sys.executable, __file__, "--worker", "one", "--out", str(out)], check=True, capture_output=True)
    expected = json.loads((out / "one-1.json").read_text())
    good = True
    for engine, processes in itertools.product(("ddp", "fsdp2"), (2, 4)):
        command = [*launcher(processes), __file__, "--worker", engine, "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        for (accumulation, slorb), ours, theirs in zip(
            CASES, json.loads((out / f"{engine}-{processes}.json").read_text()), expected, strict=True
        ):
            worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            good &= worst <= 1e-5 and len(ours) == STEPS
            print(
                f"{engine:5}  {processes} processes  accumulation {accumulation}  SLoRB {'on ' if slorb else 'off'}  "
                f"{len(ours)} steps  largest difference of a loss {worst:.1e}",
                flush=True,
            )
    return good


def command(out: Path, name: str, engine: str, processes: int) -> list[str]:
    config = ["--config", str(out / "run.yaml"), "--output-dir", str(out / name), "--resume-if-started"]
    sharded = ["--set", f"training.fsdp={str(engine == 'fsdp2').lower()}"]
    batch = ["--set", f"training.per_device_train_batch_size={4 // processes}"]
    return [*launcher(processes), "-m", "ast_sparse.cli.train", *config, *sharded, *batch]


def stop(run: "subprocess.Popen[bytes]", kill: int, processes: int, rng: random.Random) -> str:
    """Stop a run in one of three ways; return what was done."""
    if processes == 2:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        return ""
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(run.pid).children()
        asked = ranks if kill % 3 == 2 else rng.sample(ranks, min(1, len(ranks)))
        for process in asked:
            process.send_signal(signal.SIGTERM if kill % 3 == 2 else signal.SIGKILL)
    return ", all asked" if kill % 3 == 2 else ""


def wait_for_save(run: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Wait until a run begins a checkpoint, or ends."""
    known = {path.name for path in folder.glob("checkpoint-*")}
    while run.poll() is None and {path.name for path in folder.glob("checkpoint-*")} <= known:
        time.sleep(0.002)


def kill_until_done(out: Path, engine: str, processes: int, kills: int, rng: random.Random) -> bool:
    """The second part for one engine; return whether the killed run gave the same model."""
    whole, name = f"{engine}-{processes}-undisturbed", f"{engine}-{processes}-killed"
    subprocess.run(command(out, whole, engine, processes), check=True, capture_output=True)
    moments = []
    for kill in range(kills):
        run = subprocess.Popen(
            command(out, name, engine, processes), start_new_session=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_save(run, out / name)
        time.sleep(rng.uniform(0, 0.05 if kill % 2 == 0 else 1))  # during the save, or some steps later
        how = stop(run, kill, processes, rng)
        if run.wait() == 0:
            break
        newest = max((out / name).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)
        if newest is None:
            moments.append(f"none{how}")
            continue
        moments.append(newest.name + ("" if (newest / "trainer_state.json").exists() else "?") + how)
    last = subprocess.run(command(out, name, engine, processes), capture_output=True, text=True)
    if last.returncode:
        print(last.stderr[-3000:])
        return False
    first, second = (load_file(out / each / "model.safetensors") for each in (whole, name))
    worst = max(float((first[key] - second[key]).abs().max()) for key in first)
    layers = json.loads((out / name / "sparsity_config.json").read_text())["layers"]
    zeros = [float((second[f"{layer}.weight"] == 0).double().mean()) for layer in layers]
    print(
        f"{engine:5}  {processes} processes  60 steps  {len(moments)} kills, newest checkpoint at each: "
        f"{'; '.join(moments)} "
        f"(?: half written)  largest difference of a weight {worst:.1e}  zeros {min(zeros):.3%} to {max(zeros):.3%}",
        flush=True,
    )
    return worst <= 1e-5 and set(zeros) == {0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    if args.worker:
        worker(args.worker, args.out)
        return
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        good = compare(out)
        save_tiny_model(out / "model")
        (out / "text.txt").write_text(generated_text(400))
        (out / "run.yaml").write_text(CONFIG.format(root=out))
        for engine, processes in itertools.product(("ddp", "fsdp2"), (2, 4)):
            good &= kill_until_done(out, engine, processes, args.kills, random.Random(args.seed))
    print("all the same as one process" if good else "DIFFERENT")
    sys.exit(not good)


if __name__ == "__main__":
    main()
