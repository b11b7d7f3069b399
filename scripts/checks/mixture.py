"""Does a mixture of seven domains follow its rule, and does a killed run continue with the same blocks?

    python scripts/checks/mixture.py MODEL DATA OUT    # minutes on two cores

MODEL is a LLaMA-like model (a folder or .gguf file) whose tokenizer and configuration are used; the trained model is
small and has random weights. DATA is the folder of the sample's JSONL files. The check makes shards from them, runs 12
steps with an evaluation every 3, runs the same again, kills it with SIGKILL after a save and resumes it. It computes
the shares again from the logged losses, and compares the two runs.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

# starting shares and target losses of Sheared LLaMA
DOMAINS = {
    "cc": (0.67, 1.7520), "github": (0.045, 0.6216), "book": (0.045, 1.9063), "stackexchange": (0.02, 1.4482),
    "wiki": (0.045, 1.4844), "arxiv": (0.025, 1.2637), "c4-rp": (0.15, 1.9219),
}  # fmt: skip
STEPS, EVERY, KILLED_AT = 12, 3, 5
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def main(model: str, data: str, out: Path) -> None:
    out.mkdir(parents=True)
    domains = [part for name in DOMAINS for part in ("--domain", f"{name}={name}.jsonl")]
    run(
        "data",
        "prepare",
        out / "shards",
        "--tokenizer",
        model,
        "--root",
        data,
        "--shard-size",
        1,
        "--keep-long",
        *domains,
    )
    (out / "run.yaml").write_text(yaml.safe_dump(settings(model, out)))
    run("train", "--config", out / "run.yaml", "--output-dir", out / "whole")
    kill_after(out, KILLED_AT)
    run("train", "--config", out / "run.yaml", "--output-dir", out / "killed", "--resume")
    shares = check_shares(out / "whole")
    check_same(out / "whole", out / "killed")
    print(f"\nshares by the rule from the logged losses; the other run was killed at {KILLED_AT}")
    print("step " + "".join(f"{name:>15}" for name in DOMAINS))
    for step, row in shares.items():
        print(f"{step:>4} " + "".join(f"{share:>15.6f}" for share in row.values()))
    print("The killed and resumed run has the same history, losses by domain and weights.")


def settings(model: str, out: Path) -> dict[str, Any]:
    domains = {name: {"train": name, "share": share, "target": target} for name, (share, target) in DOMAINS.items()}
    return {
        "model": {"name_or_path": model, "random_weights": True, "config_overrides": SMALL},
        "data": {
            "root": str(out / "shards"), "eval_share": 0.002, "block_size": 128,
            "domains": domains,
            "update": {"type": "doremi"},
        },
        "sparsity": {"mask_interval": 5, "mask_decay": 6e-5},
        "distillation": None,
        "training": {
            "max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "use_cpu": True,
            "report_to": "none", "save_steps": 1, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": EVERY,
            "logging_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True,
        },
        "evaluation": {"datasets": []},
    }  # fmt: skip


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"ast_sparse.cli.{name}", *map(str, arguments)]


def run(name: str, *arguments: object) -> None:
    subprocess.run(command(name, *arguments), check=True)


def kill_after(out: Path, step: int) -> None:
    """Start the run, and kill it some time after it has saved a step."""
    arguments = command("train", "--config", out / "run.yaml", "--output-dir", out / "killed")
    process = subprocess.Popen(arguments)
    while newest(out / "killed") < step:
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()


def newest(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def logged(folder: Path, key: str) -> dict[int, float]:
    """The last value of each step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def check_shares(folder: Path) -> dict[int, dict[str, float]]:
    """The shares by the rule w·e^(loss − target), normalised, then (1 − c)·w + c/n; compared with the log."""
    shares = {0: {name: share for name, (share, _) in DOMAINS.items()}}
    for step in range(EVERY, STEPS + 1, EVERY):
        weights = {
            name: shares[step - EVERY][name] * math.exp(logged(folder, f"eval_{name}_loss")[step] - target)
            for name, (_, target) in DOMAINS.items()
        }
        total = sum(weights.values())
        shares[step] = {name: (1 - 1e-4) * weight / total + 1e-4 / len(DOMAINS) for name, weight in weights.items()}
        for name, share in shares[step].items():
            assert math.isclose(logged(folder, f"domain_share/{name}")[step], share, rel_tol=1e-9), (step, name)
    return shares


def check_same(whole: Path, killed: Path) -> None:
    for name in ("data_state.json", "model.safetensors"):
        ours, theirs = ((folder / f"checkpoint-{STEPS}" / name).read_bytes() for folder in (whole, killed))
        assert ours == theirs, f"{name} differs"
    for name in DOMAINS:
        for key in (f"eval_{name}_loss", f"domain_share/{name}", f"domain_epoch/{name}", f"domain_loss/{name}"):
            assert logged(whole, key) == logged(killed, key), f"{key} differs"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("out", metavar="OUT", type=Path)
    main(**vars(parser.parse_args()))
