"""Which blocks each rank trains on; `test_data.py` calls this in its own process and on gloo ranks under torchrun."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from ast_sparse import SparseTrainer, SparsityConfig
from ast_sparse.config import DataConfig
from ast_sparse.data.build import build_datasets
from ast_sparse.data.tokens.prepare import PrepareSettings, prepare_shards
from tests.models import generated_text, tiny_model, tiny_tokenizer

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
    """Documents of two domains, as JSONL and as shards."""
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


def main(root: Path) -> None:
    facts: dict[str, Any] = {}
    for name in SOURCES:
        facts[f"{name}, workers"] = run(root, name, "ddp", RANKS, dataloader_num_workers=1, max_steps=2).seen
    for kind in ("ddp", "fsdp"):  # in this order, because FSDP2 sets environment variables that stay
        for name in SOURCES:
            whole = run(root, name, kind, RANKS)
            facts[f"{name}, {kind}"] = whole.seen
            checkpoint = Path(str(whole.args.output_dir)) / f"checkpoint-{SAVED}"
            facts[f"{name}, {kind}, resumed"] = run(root, name, kind, RANKS, checkpoint).seen
    gathered: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(gathered, facts)
    if os.environ["RANK"] == "0":
        (root / "facts.json").write_text(json.dumps(gathered))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
