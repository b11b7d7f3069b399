"""Does training on several processes do what one process does? Tiny models on gloo processes on a CPU.

1. 12 steps with masks that move, in float32 and bf16: DDP and FSDP2 on 2 and 4 processes and hybrid sharding (2
   replicas on 2 processes each), with and without accumulation, SLoRB and activation checkpointing (each pair of
   these settings), compared with one process: the largest difference of a loss, and the share of mask positions that
   differ.
2. A checkpoint of each kind of run is continued by each other kind: the same.
3. `ast-train` on 2 processes, 60 steps, killed (SIGKILL) at random moments, also during saves, and started again with
   the same command until done: the largest difference of a weight from the uninterrupted run, and the share of zeros in
   the pruned layers. On 4 processes one of them is killed, and every third time all get SIGTERM instead.

    python scripts/checks/distributed.py [--kills 4] [--seed 0]    # minutes on two cores
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ast_sparse import SLoRBConfig, SparsityConfig
from tests.distributed.fsdp_facts import found, make
from tests.models import generated_text, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]

BATCH, STEPS, SAVED = 16, 12, 4
RUNS = {"ddp": (2, 4), "fsdp2": (2, 4), "hybrid": (4,)}  # processes
# dtype, accumulation, SLoRB, activation checkpointing: every pair of values is in one of these
CASES: list[tuple[str, int, bool, bool]] = [
    ("float32", 1, False, False), ("float32", 4, True, True), ("bf16", 1, True, True), ("bf16", 4, False, True),
    ("bf16", 4, True, False),
]  # fmt: skip
# largest differences; bf16 rounds what each process adds up, and FSDP2 casts all weights where one process casts some
LOSS, MASKS = {"float32": 1e-5, "bf16": 5e-3}, {"float32": 0.0, "bf16": 0.1}
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


def trainer(engine: str, folder: Path, case: tuple[str, int, bool, bool], **args: Any) -> Any:
    """A run on the processes that torchrun has started, or on this one."""
    dtype, accumulation, slorb, recomputed = case
    if engine == "hybrid":
        args["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    if recomputed and engine in ("fsdp2", "hybrid"):
        args["fsdp_config"] = {"activation_checkpointing": True}
    elif recomputed:
        args["gradient_checkpointing"] = True
    AcceleratorState._reset_state()
    return make(
        folder, SparsityConfig(mask_interval=3, mask_decay=1e-2), int(os.environ.get("WORLD_SIZE", "1")), batch=BATCH,
        slorb=SLoRBConfig(k=16) if slorb else None, dtype=torch.float32, gradient_accumulation_steps=accumulation,
        max_steps=STEPS, bf16=dtype == "bf16", fsdp=engine in ("fsdp2", "hybrid"), **args,
    )  # fmt: skip


def worker(engine: str, out: Path, resume: str | None) -> None:
    """Run the cases, or continue the checkpoint of another run."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    name, results = f"{engine}-{world}", []
    if resume is None:
        for case in CASES:
            run = trainer(engine, out / name, case)
            run.train()
            results.append(found(run))
    run = trainer(engine, out / name, CASES[0], save_strategy="steps", save_steps=SAVED)
    run.train(resume_from_checkpoint=resume)
    results.append(found(run))
    if int(os.environ.get("RANK", "0")) == 0:
        (out / f"{name}.json").write_text(json.dumps(results))


def work(engine: str, processes: int, out: Path, resume: Path | None = None) -> list[dict[str, Any]]:
    """Losses and masks of every case, and of a run that saves checkpoints."""
    start = launcher(processes) if processes > 1 else [sys.executable]
    options = [] if resume is None else ["--resume", str(resume)]
    done = subprocess.run([*start, __file__, "--worker", engine, "--out", str(out), *options], capture_output=True)
    if done.returncode:
        sys.exit(done.stderr.decode()[-3000:])
    results: list[dict[str, Any]] = json.loads((out / f"{engine}-{processes}.json").read_text())
    return results


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """The largest difference of a loss, and the share of mask positions that differ."""
    if len(ours["losses"]) != len(theirs["losses"]):
        return math.inf, 1.0
    loss = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    pairs = [(ours["masks"][name], mask) for name, mask in theirs["masks"].items()]
    differ = sum(a != b for one, two in pairs for a, b in zip(one, two, strict=True))
    return loss, differ / sum(len(mask) for _, mask in pairs)


def compare(out: Path) -> bool:
    """The first two parts; return whether all losses and masks agree."""
    expected, good = work("one", 1, out), True
    for engine, numbers in RUNS.items():
        for processes in numbers:
            results = work(engine, processes, out)
            for case, ours, theirs in zip([*CASES, CASES[0]], results, expected, strict=True):
                loss, masks = difference(ours, theirs)
                good &= loss <= LOSS[case[0]] and masks <= MASKS[case[0]]
                print(
                    f"{engine:6}  {processes} processes  {case[0]:7}  accumulation {case[1]}  SLoRB {case[2]:1}  "
                    f"recomputed {case[3]:1}  {len(ours['losses'])} steps  largest difference of a loss {loss:.1e}  "
                    f"of the masks {masks:.2%}",
                    flush=True,
                )
    return good & relay(out, expected[-1])


def relay(out: Path, expected: dict[str, Any]) -> bool:
    """The second part: one process, FSDP2, hybrid, DDP and back again, each from a checkpoint of the one before."""
    good, chain = True, (("one", 1), ("fsdp2", 4), ("hybrid", 4), ("one", 1), ("hybrid", 4), ("fsdp2", 2), ("ddp", 2))
    for (first, ranks), (engine, processes) in itertools.pairwise(chain):
        checkpoint = out / f"{first}-{ranks}" / f"checkpoint-{SAVED}"
        loss, masks = difference(work(engine, processes, out, checkpoint)[0], expected)
        good &= loss <= LOSS["float32"] and masks == 0
        print(
            f"{engine} on {processes} continues {first} on {ranks}: largest difference of a loss {loss:.1e}  "
            f"of the masks {masks:.2%}",
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
    """The third part for one engine; return whether the killed run gave the same model."""
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
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    if args.worker:
        worker(args.worker, args.out, args.resume)
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
