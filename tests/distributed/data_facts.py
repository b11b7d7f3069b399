"""Which blocks each rank trains on; `test_data.py` calls this in its own process and on gloo ranks under torchrun."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from transformers import TrainingArguments

from ast_sparse import SparseTrainer, SparsityConfig
from ast_sparse.cli import command
from ast_sparse.cli.train import main as ast_train
from ast_sparse.config import DataConfig
from ast_sparse.data.build import build_datasets
from ast_sparse.data.tokens.prepare import PrepareSettings, prepare_shards
from ast_sparse.distributed.meeting import Meeting
from ast_sparse.distributed.ranks import once_per_folder
from tests.models import generated_text, save_tiny_model, tiny_model, tiny_tokenizer

RANKS, BATCH, STEPS, SAVED = 2, 8, 6, 3
DOMAINS = {"even": {"train": "even", "share": 0.7, "target": 1.0}, "odd": {"train": "odd", "share": 0.3, "target": 4.0}}
SOURCES: dict[str, dict[str, Any]] = {
    "shards": {"train": ("even", "odd"), "eval_share": 0.0},
    "mixture": {"domains": DOMAINS, "update": {"type": "doremi"}, "eval_share": 0.2},
    "stream": {"train": ("even.jsonl", "odd.jsonl"), "streaming": True, "eval_share": 0.0},
}
Blocks = list[list[list[int]]]  # by step: for each micro-batch, the tokens of each row as one list


class Recorded(SparseTrainer):
    """Records what each step trains on."""

    seen: Blocks

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            while len(self.seen) <= self.state.global_step:
                self.seen.append([])
            self.seen[self.state.global_step] += inputs["input_ids"].tolist()
        return super().compute_loss(model, inputs, *args, **kwargs)


def write_text(root: Path) -> None:
    """Documents of two domains, as JSONL and as shards, and a model."""
    save_tiny_model(root / "llama")
    for name, first in (("even", 0), ("odd", 1)):
        texts = [generated_text(8, seed=seed) for seed in range(first, 60, 2)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        settings = PrepareSettings(entries=(f"{name}.jsonl",), root=str(root), shard_characters=3000)
        prepare_shards(root / name, settings, tiny_tokenizer())


def run(root: Path, name: str, kind: str, world: int, resume: Path | None = None, **values: Any) -> Recorded:
    """A run on a source with a kind of parallelism (none, ddp or fsdp) and two micro-batches per step."""
    AcceleratorState._reset_state()  # one process runs both kinds
    settings = DataConfig(root=str(root), block_size=16, **SOURCES[name])
    train, held_out, _ = build_datasets(settings, tiny_tokenizer())
    args: dict[str, Any] = dict(
        max_steps=STEPS, per_device_train_batch_size=BATCH // world // 2, gradient_accumulation_steps=2, use_cpu=True,
        report_to="none", disable_tqdm=True, save_steps=SAVED, fsdp=kind == "fsdp", logging_steps=1, learning_rate=1e-3,
        **({"eval_strategy": "steps", "eval_steps": 2} if held_out is not None else {}),
    )  # fmt: skip
    out = root / (f"{name}-{kind}-{world}" + ("-resumed" if resume else ""))
    found = Recorded(
        tiny_model("llama").double(),
        TrainingArguments(str(out), **{**args, **values}),
        sparsity_config=SparsityConfig(mask_interval=0),
        distillation_config=None,
        mixture_config=settings.mixture if settings.domains else None,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tiny_tokenizer(),
    )
    found.seen = []
    found.train(resume_from_checkpoint=None if resume is None else str(resume))
    return found


def made_in(cache: Path, root: Path) -> int:
    """How many files of tokenised text this process makes in a cache."""
    cache.mkdir(exist_ok=True)
    datasets.config.HF_DATASETS_CACHE = cache
    made = []

    def work() -> None:
        before = set(cache.rglob("*.arrow"))
        build_datasets(DataConfig(root=str(root), train=("even.jsonl",), block_size=16), tiny_tokenizer())
        made.extend(set(cache.rglob("*.arrow")) - before)

    once_per_folder(cache, work)
    assert not list(cache.glob(".*"))
    return len(made)


def errors(root: Path, rank: int, wanted: slice) -> dict[str, tuple[int, str]]:
    """Exit code and messages of this process for commands that some or all processes refuse."""
    config = root / "run.yaml"
    training = {"max_steps": 1, "use_cpu": True, "report_to": "none"}
    data = {"root": str(root), "train": "even.jsonl", "block_size": 16}
    config.write_text(
        yaml.safe_dump({"model": {"name_or_path": str(root / "llama")}, "data": data, "training": training})
    )
    save_tiny_model(root / f"llama-{rank}", seed=rank)
    absent, other = (("even.jsonl", name)[rank] for name in ("absent.jsonl", "odd.jsonl"))
    fast = ["--set", "evaluation.datasets=[]", "--set", "distillation=null"]
    cases = {
        "options, on all": ["--resume", "--overwrite"],
        "configuration, on one": ["--config", str(config if rank == 0 else root / "absent.yaml")],
        "argument, on all": ["--set", "training.max_stepz=1"],
        "text, on one": ["--set", f"data.train={absent}"],
        "other setting": ["--set", f"training.learning_rate={1 + rank}e-3"],
        "other model": ["--set", f"model.name_or_path={root}/llama-{rank}"],
        "other model, --find-lr": ["--find-lr", "1e-3", "--set", f"model.name_or_path={root}/llama-{rank}"],
        "other evaluation": ["--set", f"evaluation.datasets=[{other}]"],
        "other text": [*fast, "--set", f"data.train={other}"],
        "other folder": [*fast, "--set", "training.fsdp=true", "--output-dir", f"{root}/refused {rank}"],
    }
    command._PRINT_S = 0.1
    is_first_to, found = Meeting.is_first_to, {}
    for name, options in list(cases.items())[wanted]:  # a process has one error in its life: here each has its own
        Meeting.is_first_to = lambda self, what, name=name: is_first_to(self, f"{what}, {name}")  # type: ignore[method-assign]
        done = CliRunner().invoke(ast_train, ["--config", str(config), "--output-dir", str(root / "refused"), *options])
        found[name] = (done.exit_code, done.stderr)
    return found


def main(root: Path) -> None:
    rank = int(os.environ["RANK"])
    facts: dict[str, Any] = {"errors": errors(root, rank, slice(-1))}  # some before there is a process group
    for name in SOURCES:
        facts[f"{name}, workers"] = run(root, name, "ddp", RANKS, dataloader_num_workers=1, max_steps=2).seen
    for kind in ("ddp", "fsdp"):  # in this order, because FSDP2 sets environment variables that stay
        for name in SOURCES:
            whole = run(root, name, kind, RANKS)
            facts[f"{name}, {kind}"] = whole.seen
            checkpoint = Path(str(whole.args.output_dir)) / f"checkpoint-{SAVED}"
            facts[f"{name}, {kind}, resumed"] = run(root, name, kind, RANKS, checkpoint).seen
    facts["errors"] |= errors(root, rank, slice(-1, None))  # after FSDP2, as above
    facts["made in one cache"] = made_in(root / "cache", root)
    facts["made in its cache"] = made_in(root / f"cache of node {rank}", root)
    gathered: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(gathered, facts)
    if rank == 0:
        (root / "facts.json").write_text(json.dumps(gathered))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
