"""The two halves of older_version.sh: `make FOLDER` with the older code on the path, `check FOLDER` with this code.

Only names that every version has are used: public ones, the commands, and the tiny models of the tests.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

import ast_sparse

FAMILIES = ("llama", "gpt2")
STEPS = 4  # also saved after half of them
FORMATS = ("dense", "compressed")
CONFIG = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/{text}, eval_share: 0.1, block_size: 32}}
sparsity: {{mask_interval: 1, mask_decay: 1e-2}}
slorb: {{k: 8}}
training:
  {{max_steps: {steps}, save_steps: {half}, per_device_train_batch_size: 2, learning_rate: 3e-3, use_cpu: true,
    report_to: none, disable_tqdm: true}}
evaluation: {{datasets: [{folder}/text.txt], seq_len: 32, windows: 2}}
"""

State = dict[str, Tensor]


def call(command: str, *arguments: object) -> None:
    """Run one of the commands in this process."""
    result = CliRunner().invoke(
        import_module(f"ast_sparse.cli.{command}").main, [str(argument) for argument in arguments]
    )
    if result.exit_code:
        sys.exit(f"ast-{command} {' '.join(map(str, arguments))}\n{result.output}\n{result.exception!r}")


def train(folder: Path, text: str, out: Path, *options: str) -> None:
    config = folder / f"{text}.yaml"
    config.write_text(CONFIG.format(folder=folder, text=text, steps=STEPS, half=STEPS // 2), encoding="utf-8")
    call("train", "--config", config, "--output-dir", out, *options)


def export(checkpoint: Path, out: Path) -> None:
    for kind in FORMATS:
        call("export", checkpoint, out / kind, "--format", kind)


def measure(folder: Path, out: Path) -> None:
    """Perplexities of the final model and of both exports, as JSON."""
    text = ("--dataset", folder / "text.txt", "--seq-len", 32, "--limit", 4, "--device", "cpu")
    call("eval", folder / "run", *(folder / kind for kind in FORMATS), *text, "--json", out)


def loaded(folder: Path) -> Iterator[tuple[str, State]]:
    """The weights of every folder, loaded in each way."""
    from transformers import AutoModelForCausalLM

    for name in ("run", f"run/checkpoint-{STEPS // 2}", *FORMATS):
        yield f"{name} by load_causal_lm", ast_sparse.load_causal_lm(folder / name).state_dict()
        if "checkpoint" not in name:  # those of a run have masks, which only the package applies
            yield f"{name} by transformers", AutoModelForCausalLM.from_pretrained(folder / name).state_dict()


def make(folder: Path) -> None:
    """Write everything that a version writes, and record what it reads from that."""
    from tests.models import generated_text, save_tiny_model

    family = folder.name
    save_tiny_model(folder / "model", family)
    (folder / "text.txt").write_text(generated_text(400), encoding="utf-8")
    call("data", "prepare", folder / "shards", folder / "text.txt", "--tokenizer", folder / "model", "--workers", 1)
    train(folder, "text.txt", folder / "run")
    train(folder, "shards", folder / "run_on_shards")
    export(folder / f"run/checkpoint-{STEPS // 2}", folder)
    measure(folder, folder / "eval.json")
    for number, (_, state) in enumerate(loaded(folder)):
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / f"loaded-{number}.safetensors")


def check(folder: Path) -> None:
    """Read, measure, export, resume and train on all of it with this version."""
    new = folder / "new"
    new.mkdir()
    for number, (how, state) in enumerate(loaded(folder)):
        same(how, state, load_file(folder / f"loaded-{number}.safetensors"))
    export(folder / f"run/checkpoint-{STEPS // 2}", new)
    for kind in FORMATS:
        for file in ("model.safetensors", "slorb/adapter_model.safetensors"):
            same(
                f"export of the checkpoint, {kind}/{file}",
                load_file(new / kind / file),
                load_file(folder / kind / file),
            )
    measure(folder, new / "eval.json")
    expected, found = perplexities(folder / "eval.json"), perplexities(new / "eval.json")
    report("perplexities by ast-eval", found == expected, f"{found}, not {expected}")
    shutil.copytree(folder / "run", new / "run")
    shutil.rmtree(new / f"run/checkpoint-{STEPS}")
    train(folder, "text.txt", new / "run", "--resume")
    train(folder, "shards", new / "run_on_shards")
    for run, what in {"run": "run resumed", "run_on_shards": "run on the shards"}.items():
        for file in (f"checkpoint-{STEPS}/model.safetensors", "model.safetensors", "slorb/adapter_model.safetensors"):
            same(f"{what}, {file}", load_file(new / run / file), load_file(folder / run / file))


def perplexities(file: Path) -> list[tuple[str, float]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return [(Path(row["model"]).name, row["perplexity"]) for row in rows]


def same(what: str, found: State, expected: State) -> None:
    differing = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        one, other = found[name].contiguous(), expected[name].contiguous()
        if one.dtype != other.dtype or not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            differing.append(name)
    report(f"{what}, {len(expected)} tensors", not differing, f"these differ: {differing}")


def report(what: str, is_same: bool, otherwise: str) -> None:
    print(f"  {what}: {'as they were' if is_same else otherwise}", flush=True)
    if not is_same:
        sys.exit(1)


if __name__ == "__main__":
    task, work = sys.argv[1:]
    for name in FAMILIES:
        print(f"{task} {name} with {Path(ast_sparse.__file__).parent}", flush=True)
        (check if task == "check" else make)(Path(work) / name)
