"""Does training on several processes do what one process does? Tiny models on gloo processes on a CPU.

cases: 12 steps with masks that move, in float32 and bf16: DDP and FSDP2 on 2 and 4 processes and hybrid sharding (2
   replicas on 2 processes each), with and without accumulation, SLoRB and activation checkpointing (each pair of these
   settings). Each is compared with its twin: one process that goes through the same micro-batches one after the other
   (accumulation x processes), and casts what the run casts: FSDP2 casts every weight to bf16 and hands activations on
   in bf16, which autocast does not, so its twin is FSDP2 on one process. In float32 it is also compared with one
   process that has the whole batch at once; in bf16 that run differs more, because each micro-batch's gradient is
   rounded. Before the first refresh losses must be equal; afterwards too, and all masks, except where gloo sums over
   four processes in an order of its own. Printed: the largest difference of a loss, and the share of mask positions
   that differ.
relay: a checkpoint of each kind of run is continued by each other kind: the same; and replicas write each piece once.
kills: `ast-train` on 2 processes, all killed (SIGKILL) at random moments, also during saves and while it starts, and
   started again with the same command until done: the largest difference of a weight and of a loss from the
   uninterrupted run, and the share of zeros in the pruned layers. On 4 processes one of them is killed, and every third
   time all get SIGTERM instead. No process may be left, and none may run on.

    python scripts/checks/distributed.py [cases] [relay] [kills] [--engine fsdp2] [--processes 4] [--kills 4]
    # minutes on two cores; without a part, all of them
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
from torch.distributed.checkpoint import FileSystemReader

from ast_sparse import SLoRBConfig, SparsityConfig
from ast_sparse.storage.sharded import MODEL_FOLDER, OPTIMIZER_FOLDER
from tests.distributed.fsdp_facts import found, make
from tests.models import generated_text, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]

BATCH, STEPS, STEPS_RELAY, SAVED = 16, 12, 14, 2
RUNS = {"ddp": (2, 4), "fsdp2": (2, 4), "hybrid": (4,)}  # processes
# dtype, accumulation, SLoRB, activation checkpointing: every pair of values is in one of these
CASES: list[tuple[str, int, bool, bool]] = [
    ("float32", 1, False, False), ("float32", 4, True, True), ("bf16", 1, True, True), ("bf16", 4, False, True),
    ("bf16", 4, True, False),
]  # fmt: skip
RELAYED = ("float32", 1, True, False)
PARTS = ("cases", "relay", "kills")
INTERVAL = 3  # steps between two refreshes of the masks
LOSS = 1e-5  # largest difference
# The same in bf16 if more than two processes sum in one group: the order is gloo's own. The last bit of a float32 sum
# then turns the rounding of a few weights to bf16. With two processes, a twin that summed in another order differed by
# 1.3e-4 and 0.1%, one that summed in the same order by 2e-7 and nothing.
LOSS_REORDERED, MASKS_REORDERED = 3e-4, 0.003
MARK = "AST_SPARSE_CHECK"  # variable in the environment of a run that is killed
STEPS_KILLED, START_S, LONGEST_END_S = 150, 30.0, 60.0
CONFIG = """
model: {{name_or_path: {root}/model}}
data: {{train: {root}/text.txt, eval_share: 0.1, block_size: 16}}
sparsity: {{mask_interval: 5, mask_decay: 1e-2, exclude: [up_proj]}}
slorb: {{k: 16}}
training:
  max_steps: {steps}
  per_device_train_batch_size: 2
  learning_rate: 1e-3
  save_steps: 5
  save_total_limit: 2
  use_cpu: true
  report_to: none
  logging_steps: 1
  disable_tqdm: true
evaluation: {{windows: 2}}
"""


def launcher(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def trainer(engine: str, folder: Path, case: tuple[str, int, bool, bool], twin_of: int = 1, **args: Any) -> Any:
    """A run on the processes that torchrun has started, or on this one.

    Args:
        twin_of: number of processes whose micro-batches this one process has.
    """
    dtype, accumulation, slorb, recomputed = case
    if engine == "hybrid":
        args["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    if recomputed and engine in ("fsdp2", "hybrid"):
        args["fsdp_config"] = {"activation_checkpointing": True}
    elif recomputed:
        args["gradient_checkpointing"] = True
    AcceleratorState._reset_state()
    return make(
        folder, SparsityConfig(mask_interval=INTERVAL, mask_decay=1e-2), int(os.environ.get("WORLD_SIZE", "1")),
        batch=BATCH, slorb=SLoRBConfig(k=16) if slorb else None, dtype=torch.float32,
        max_steps=args.pop("max_steps", STEPS),
        gradient_accumulation_steps=accumulation * twin_of, bf16=dtype == "bf16",
        fsdp=engine in ("fsdp2", "hybrid"), **args,
    )  # fmt: skip


def add_up_as(run: Any, processes: int, shards: int) -> None:
    """Let a run in one process add up its gradients in the order of a run of `processes`, in replicas of `shards`.

    Those sum inside a replica after each micro-batch, and over the replicas after the last one of a step.
    """
    step, count, last = run.training_step, itertools.count(), run.args.gradient_accumulation_steps - 1
    inside: dict[Any, Any] = {}
    replicas: list[dict[Any, Any]] = [{} for _ in range(processes // shards)]

    def micro_batch(*args: Any, **kwargs: Any) -> Any:
        loss, turn = step(*args, **kwargs), next(count) % (last + 1)
        replica, shard = divmod(turn % processes, shards)
        own = replicas[replica]
        for weight in (each for each in run.student.parameters() if each.grad is not None):
            inside[weight] = inside[weight] + weight.grad if shard else weight.grad
            weight.grad = None
            if shard == shards - 1:
                own[weight] = own[weight] + inside[weight] if turn >= processes else inside[weight]
            if turn == last:
                weight.grad = sum(each[weight] for each in replicas[1:]) + replicas[0][weight]
        return loss

    run.training_step = micro_batch


def worker(engine: str, out: Path, resume: str | None, twin_of: int, shards: int) -> None:
    """Run the cases, or one that saves checkpoints or continues the checkpoint of another run."""
    name, results = f"{engine}-{os.environ.get('WORLD_SIZE', '1')}", []
    if resume is None:
        for case in CASES:
            run = trainer(engine, out / name, case, twin_of)
            if twin_of > 1:
                add_up_as(run, twin_of, shards)
            run.train()
            results.append(found(run))
    else:
        run = trainer(engine, out / name, RELAYED, max_steps=STEPS_RELAY, save_strategy="steps", save_steps=SAVED)
        run.train(resume_from_checkpoint=resume or None)
        results.append(found(run))
    if int(os.environ.get("RANK", "0")) == 0:
        (out / f"{name}.json").write_text(json.dumps(results))


def work(
    engine: str, processes: int, out: Path, resume: str | None = None, twin_of: int = 1, shards: int = 1
) -> list[dict[str, Any]]:  # fmt: skip
    """Losses and masks of every case; or of a run that saves checkpoints and continues `resume`, if it names one."""
    start = [sys.executable] if engine == "one" else launcher(processes)
    options = [] if resume is None else ["--resume", resume]
    done = subprocess.run(
        [*start, __file__, "--worker", engine, "--out", str(out), "--twin-of", str(twin_of), "--shards",
         str(shards), *options],
        capture_output=True,
    )  # fmt: skip
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


def compare(out: Path, runs: list[tuple[str, int]]) -> bool:
    """The first part; return whether all losses and masks agree."""
    expected, good = work("one", 1, out), True
    for engine, processes in runs:
        results = work(engine, processes, out)
        shards = {"ddp": 1, "fsdp2": processes, "hybrid": 2}[engine]
        twins = work("one" if engine == "ddp" else "fsdp2", 1, out, twin_of=processes, shards=shards)
        for case, ours, twin, theirs in zip(CASES, results, twins, expected, strict=True):
            loss, masks = difference(ours, twin)
            plain_loss, plain_masks = difference(ours, theirs)
            first = max(abs(a - b) for a, b in zip(ours["losses"][:INTERVAL], twin["losses"], strict=False))
            is_reordered = case[0] == "bf16" and processes == 4 and engine != "hybrid"
            good &= loss <= (LOSS_REORDERED if is_reordered else LOSS) and first <= LOSS
            good &= masks <= (MASKS_REORDERED if is_reordered else 0)
            good &= case[0] != "float32" or (plain_loss <= LOSS and plain_masks == 0)
            print(
                f"{engine:6}  {processes} processes  {case[0]:7}  accumulation {case[1]}  SLoRB {case[2]:1}  "
                f"recomputed {case[3]:1}  {len(ours['losses'])} steps  largest difference of a loss {loss:.1e} of the "
                f"masks {masks:.3%}; from one process with the whole batch {plain_loss:.1e} and {plain_masks:.3%}",
                flush=True,
            )
    return good


def surplus(checkpoint: Path) -> int:
    """Bytes in the files of a sharded checkpoint beyond its pieces: replicas must not write what they share."""
    found = 0
    for folder in (checkpoint / MODEL_FOLDER, checkpoint / OPTIMIZER_FOLDER):
        pieces = FileSystemReader(folder).read_metadata().storage_data.values()
        found += sum(path.stat().st_size for path in folder.glob("*.distcp")) - sum(each.length for each in pieces)
    return found


def relay(out: Path) -> bool:
    """The second part: one process, FSDP2, hybrid, DDP and back again, each from a later checkpoint of the last."""
    good, chain = True, (("one", 1), ("fsdp2", 4), ("hybrid", 4), ("one", 1), ("hybrid", 4), ("fsdp2", 2), ("ddp", 2))
    expected = work("one", 1, out, "")[0]
    for turn, ((first, ranks), (engine, processes)) in enumerate(itertools.pairwise(chain), 1):
        checkpoint = out / f"{first}-{ranks}" / f"checkpoint-{SAVED * turn}"
        loss, masks = difference(work(engine, processes, out, str(checkpoint))[0], expected)
        own = out / f"{engine}-{processes}" / f"checkpoint-{STEPS_RELAY}"
        twice = surplus(own) if engine in ("fsdp2", "hybrid") else 0
        good &= loss <= LOSS and masks == 0 and twice == 0
        print(
            f"{engine} on {processes} continues {first} on {ranks} at step {SAVED * turn}: largest difference of a "
            f"loss {loss:.1e} of the masks {masks:.3%}; bytes in its checkpoint beyond its pieces: {twice}",
            flush=True,
        )
    return good


def command(out: Path, name: str, engine: str, processes: int) -> list[str]:
    config = ["--config", str(out / "run.yaml"), "--output-dir", str(out / name), "--resume-if-started"]
    sharded = ["--set", f"training.fsdp={str(engine == 'fsdp2').lower()}"]
    batch = ["--set", f"training.per_device_train_batch_size={4 // processes}"]
    return [*launcher(processes), "-m", "ast_sparse.cli.train", *config, *sharded, *batch]


def started_by(mark: str) -> list[psutil.Process]:
    """The processes that are alive and have a mark in their environment, as every child of a marked one has."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def stop(run: "subprocess.Popen[bytes]", mark: str, kill: int, processes: int, rng: random.Random) -> str:
    """Stop a run in one of three ways; return which."""
    if processes == 2:
        for process in started_by(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        return "all killed"
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(run.pid).children()
        asks = kill % 3 == 2
        chosen = rng.sample(range(len(ranks)), min(1, len(ranks)))
        for process in ranks if asks else [ranks[each] for each in chosen]:
            process.send_signal(signal.SIGTERM if asks else signal.SIGKILL)
        return "all asked" if asks else f"process {chosen[0]} killed" if chosen else "too early"
    return "too late"


def wait_for_moment(run: "subprocess.Popen[bytes]", folder: Path, kill: int, rng: random.Random) -> None:
    """Wait for a random moment: in the save of a checkpoint, some steps later, or since the start of the run."""
    if kill % 4 == 3:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(rng.uniform(0, START_S))
        return
    known = {path.name for path in folder.glob("checkpoint-*")}
    while run.poll() is None and {path.name for path in folder.glob("checkpoint-*")} <= known:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05 if kill % 2 == 0 else 3))


def ended(run: "subprocess.Popen[bytes]", mark: str) -> str:
    """Wait for the end of a run that was stopped; return what is wrong with it, or nothing."""
    wrong = ""
    try:
        run.wait(LONGEST_END_S)
    except subprocess.TimeoutExpired:
        wrong = f", STILL RUNS after {LONGEST_END_S} s"
    until = time.monotonic() + 5
    while (left := started_by(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    if left and not wrong:
        wrong = f", {len(left)} PROCESSES LEFT"
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    run.wait()
    return wrong


def kill_until_done(out: Path, engine: str, processes: int, kills: int, rng: random.Random) -> bool:
    """The third part for one engine; return whether the killed run gave the same model."""
    whole, name = f"{engine}-{processes}-undisturbed", f"{engine}-{processes}-killed"
    subprocess.run(command(out, whole, engine, processes), check=True, capture_output=True)
    good, done = True, 0
    for kill in range(kills):
        mark, log = f"{out}/{name} {kill}", out / f"{name}-{kill}.log"
        begin = time.monotonic()
        with log.open("wb") as stream:
            run = subprocess.Popen(
                command(out, name, engine, processes), start_new_session=True, stdout=stream, stderr=stream,
                env={**os.environ, MARK: mark},
            )  # fmt: skip
        wait_for_moment(run, out / name, kill, rng)
        how, asked = stop(run, mark, kill, processes, rng), time.monotonic()
        wrong = ended(run, mark) + (", A TRACEBACK" if "[rank" in log.read_text() else "")
        checkpoints = sorted((out / name).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        states = [path.name + ("" if (path / "trainer_state.json").exists() else "?") for path in checkpoints]
        print(
            f"{engine:5}  {processes} processes  {asked - begin:5.1f} s after its start: {how}, exit {run.returncode} "
            f"after {time.monotonic() - asked:4.1f} s{wrong}; {', '.join(states) or 'no checkpoint'}",
            flush=True,
        )
        good &= not wrong
        if run.returncode == 0:
            print(f"FINISHED before all kills: {kill} of {kills}")
            good = False
            break
        done += 1
    last = subprocess.run(command(out, name, engine, processes), capture_output=True, text=True)
    if last.returncode:
        print(last.stderr[-3000:])
        return False
    first, second = (load_file(out / each / "model.safetensors") for each in (whole, name))
    worst = max(float((first[key] - second[key]).abs().max()) for key in first)
    layers = json.loads((out / name / "sparsity_config.json").read_text())["layers"]
    zeros = [float((second[f"{layer}.weight"] == 0).double().mean()) for layer in layers]
    rows = [[json.loads(line) for line in (out / each / "metrics.jsonl").open()] for each in (whole, name)]
    steps = [{row["step"]: row["loss"] for row in each if "loss" in row} for each in rows]
    losses = max(abs(steps[0][step] - steps[1].get(step, math.inf)) for step in steps[0])
    print(
        f"{engine:5}  {processes} processes  {STEPS_KILLED} steps  {done} kills  (?: half written)  largest difference "
        f"of a weight {worst:.1e}, of a logged loss {losses:.1e}  zeros {min(zeros):.3%} to {max(zeros):.3%}",
        flush=True,
    )
    return good and worst <= 1e-5 and losses <= 1e-5 and set(zeros) == {0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", choices=(*PARTS, []), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--engine", choices=RUNS, help="cases and kills of this one alone")
    parser.add_argument("--processes", type=int, choices=(2, 4), help="cases and kills on so many alone")
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep runs and messages there; a new folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    parser.add_argument("--twin-of", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    if args.worker:
        worker(args.worker, args.out, args.resume, args.twin_of, args.shards)
        return
    asked = [(engine, number) for engine, numbers in RUNS.items() for number in numbers]
    asked = [each for each in asked if args.engine in (None, each[0]) and args.processes in (None, each[1])]
    parts, good = args.parts or PARTS, True
    with tempfile.TemporaryDirectory() as name:
        out = args.out or Path(name)
        out.mkdir(parents=True, exist_ok=True)
        if "cases" in parts:
            good &= compare(out, asked)
        if "relay" in parts:
            good &= relay(out)
        if "kills" in parts:
            save_tiny_model(out / "model")
            (out / "text.txt").write_text(generated_text(400))
            (out / "run.yaml").write_text(CONFIG.format(root=out, steps=STEPS_KILLED))
            for engine, processes in asked:
                if engine != "hybrid":
                    good &= kill_until_done(out, engine, processes, args.kills, random.Random(args.seed))
    print("all the same as one process" if good else "DIFFERENT")
    sys.exit(not good)


if __name__ == "__main__":
    main()
