"""What TensorBoard and Weights & Biases (offline) hold of a run that is stopped and resumed; `trackers.sh` calls this.

One run is undisturbed, one gets SIGTERM in its sixth step and is started again with the same command. Both record every
step in both trackers. Each tracker must have the names of the log; steps that only go forward, across the resume too;
every value once, unless it is repeated with the same number; and the values of the undisturbed run.
"""

import json
import math
import os
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from tests.models import generated_text, save_tiny_model

STEPS, STOPPED = 12, 6
_BLOCK = 32_768
EXPECTED = (
    "train/loss", "train/grad_norm", "train/learning_rate", "train/mask_decay", "train/flip_rate",
    "train/initial_flip_rate", "train/heldout_perplexity", "train/other_perplexity", "eval/loss",
)  # fmt: skip
# differ from run to run; train_loss is the mean over the steps of one start
MEASURED = (
    "runtime",
    "per_second",
    "seconds",
    "memory",
    "mfu",
    "flops",
    "total_flos",
    "train_loss",
    "_timestamp",
    "_step",
)
STOP = """
import os, signal, sys
from transformers import TrainerCallback
from ast_sparse.cli.train import main
from ast_sparse.training.trainer import SparseTrainer

class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == {stopped} - 1 and {stopped} > 0:
            os.kill(os.getpid(), signal.SIGTERM)

build = SparseTrainer.__init__
def with_stop(self, *arguments, **keywords):
    build(self, *arguments, **keywords)
    self.add_callback(Stop())
SparseTrainer.__init__ = with_stop
sys.argv[0] = "ast-train"
main()
"""
Series = dict[str, list[tuple[int, float]]]  # (step, value) in the order of writing


def settings(folder: Path) -> Path:
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(generated_text(200))
    (folder / "other.txt").write_text(generated_text(40, seed=1))
    tree = {
        "model": {"name_or_path": str(folder / "model")},
        "data": {"root": str(folder), "train": "text.txt", "eval_share": 0.1, "block_size": 16},
        "sparsity": {"mask_interval": 2, "mask_decay": 1e-3},
        "training": {
            "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1,
            "eval_strategy": "steps", "eval_steps": 3, "save_steps": 4, "use_cpu": True, "disable_tqdm": True,
            "report_to": ["tensorboard", "wandb"],
        },
        "evaluation": {"datasets": ["heldout", "other.txt"], "steps": 3, "seq_len": 16, "windows": 2},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


def train(folder: Path, name: str, stopped: int = 0) -> int:
    """Exit code of one start of the run `name`."""
    environment = {
        **os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(folder / name),
        "WANDB_RUN_ID": name, "WANDB_RESUME": "allow",  # so that both starts are one run there
        "TENSORBOARD_LOGGING_DIR": str(folder / name / "tensorboard"),
    }  # fmt: skip
    (folder / name).mkdir(exist_ok=True)
    program = STOP.format(stopped=stopped)
    command = ["--config", str(folder / "run.yaml"), "--output-dir", str(folder / name / "out"), "--resume-if-started"]
    done = subprocess.run([sys.executable, "-c", program, *command], env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 75):
        sys.exit(f"The run {name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.returncode


def tensorboard_series(folder: Path) -> Series:
    """All files of a run, in the order in which they were begun."""
    found: Series = defaultdict(list)
    for file in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.name):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] += [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def wandb_records(file: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of an offline file: LevelDB's log format after seven bytes of its own. wandb has no reader of it."""
    content, place, parts = file.read_bytes(), 7, []
    while place + 7 <= len(content):
        if (left := _BLOCK - place % _BLOCK) < 7:  # padding
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def wandb_series(folder: Path) -> tuple[Series, list[str]]:
    """The history in all offline files of a run, and the ids of its runs."""
    found: Series = defaultdict(list)
    ids = []
    for file in sorted(folder.rglob("run-*.wandb"), key=lambda path: path.parent.name):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.append(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                step = row.get("train/global_step")
                for key, value in row.items():
                    if step is not None and isinstance(value, int | float):
                        found[key].append((int(step), float(value)))
    return found, ids


def faults(name: str, series: Series, whole: Series) -> list[str]:
    """What is wrong with the series of a resumed run beside those of the undisturbed one."""
    found = [f"{name} has no {tag}" for tag in EXPECTED if not series.get(tag)]
    for tag, points in series.items():
        if any(part in tag for part in MEASURED):
            continue
        steps = [step for step, _ in points]
        if steps != sorted(steps):
            found.append(f"{name}, {tag}: steps go back: {steps}")
        values: dict[int, set[float]] = defaultdict(set)
        for step, value in points:
            values[step].add(value)
        if twice := [step for step, each in values.items() if len(each) > 1]:
            found.append(f"{name}, {tag}: more than one value at {twice}")
        expected = dict(whole.get(tag, []))
        if set(values) != set(expected):
            found.append(f"{name}, {tag}: steps {sorted(values)}, undisturbed {sorted(expected)}")
        elif differing := [s for s in values if not all(math.isclose(v, expected[s], rel_tol=1e-6) for v in values[s])]:
            found.append(f"{name}, {tag}: other values at {differing}")
    return found


def main(folder: Path) -> int:
    settings(folder)
    assert train(folder, "whole") == 0
    assert train(folder, "stopped", STOPPED) == 75
    assert (folder / "stopped/out" / f"checkpoint-{STOPPED}").is_dir()
    assert train(folder, "stopped") == 0
    tensorboard = [tensorboard_series(folder / name) for name in ("stopped", "whole")]
    (resumed, ids), (undisturbed, _) = wandb_series(folder / "stopped"), wandb_series(folder / "whole")
    found = faults("tensorboard", *tensorboard) + faults("wandb", resumed, undisturbed)
    if set(ids) != {"stopped"}:
        found.append(f"wandb: the starts of one run are {ids}")
    for name, series in (("tensorboard", tensorboard[0]), ("wandb", resumed)):
        print(f"{name}: {len(series)} series; {', '.join(sorted(series))}")
        print(f"  train/loss at {[step for step, _ in series.get('train/loss', [])]}")
    print("\n".join(found) or "no fault")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
