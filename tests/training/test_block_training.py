"""Training on blocks of shards: the samples of the mixture, step by step, also across epochs and after a resume."""

from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from ast_sparse import SparseTrainer, SparsityConfig
from ast_sparse.cli.train import main
from ast_sparse.data.blocks.collator import CausalLMCollator
from ast_sparse.data.blocks.stored import TokenBlocks
from ast_sparse.training.loader import DATA_STATE, make_mixture
from tests.data.documents import documents
from tests.data.folders import build, shards, write
from tests.models import save_tiny_model, tiny_model
from tests.training.small_runs import arguments


class Recording(CausalLMCollator):
    """Remembers the rows of every batch."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rows: list[list[int]] = []

    def __call__(self, features: Any) -> dict[str, torch.Tensor]:
        self.rows += [list(map(int, feature["input_ids"])) for feature in features]
        return super().__call__(features)


def run(folder: Path, blocks: TokenBlocks, resume: str | None = None, **args: Any) -> Recording:
    collator = Recording()
    settings = {"max_steps": 9, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, **args}
    trainer = SparseTrainer(
        tiny_model("llama"),
        arguments(folder, **{"gradient_accumulation_steps": 2, **settings}),
        sparsity_config=SparsityConfig(mask_interval=2),
        train_dataset=blocks,
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return collator


def test_every_step_trains_on_its_samples_across_epochs_and_after_a_resume(tmp_path: Path) -> None:
    blocks = build(tmp_path, shards(tmp_path, write(tmp_path, "a.jsonl", documents(36))), eval_share=0)[0]
    assert isinstance(blocks, TokenBlocks)
    blocks = TokenBlocks(blocks.folders, blocks.stretches, 16)
    assert 10 < len(blocks) < 36  # fewer than nine steps of four blocks use
    whole = run(tmp_path / "whole", blocks)
    mixture = make_mixture({"train": blocks}, None, arguments(tmp_path, per_device_train_batch_size=4))
    order = [int(block) for step in range(9) for block in mixture.samples(step)[1]]
    assert whole.rows == [blocks[index]["input_ids"].tolist() for index in order]
    assert sorted(order[: len(blocks)]) == list(range(len(blocks)))
    for step in (2, 4, 8):
        again = run(tmp_path / f"from-{step}", blocks, resume=str(tmp_path / f"whole/checkpoint-{step}"))
        assert again.rows == whole.rows[4 * step :]
        states = [load_file(tmp_path / name / "checkpoint-9/model.safetensors") for name in ("whole", f"from-{step}")]
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    wider = run(tmp_path / "wider", blocks, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert wider.rows == whole.rows


def train(root: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["--config", str(root / "run.yaml"), "--output-dir", str(root / "out"), *options])


def configure(root: Path, **data: Any) -> None:
    tree = {
        "model": {"name_or_path": str(root / "model")},
        "data": {"root": str(root), "eval_share": 0.1, "block_size": 16, **data},
        "sparsity": {"mask_interval": 2},
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "save_steps": 2,
            "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1,
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(tree))


def test_ast_train_reads_shards_and_refuses_to_resume_with_other_text(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    for name, texts in (("a", documents(60)), ("b", documents(120)[60:])):
        shards(tmp_path, write(tmp_path, f"{name}.jsonl", texts))
    configure(tmp_path, train="a")
    result = train(tmp_path)
    assert result.exit_code == 0, result.output
    assert "train: 54 documents" in result.output and "held out: 6 documents" in result.output
    assert (tmp_path / "out/checkpoint-2" / DATA_STATE).is_file()
    configure(tmp_path, train="b")
    refused = train(tmp_path, "--resume")
    assert refused.exit_code == 2 and "The number of training blocks" in refused.stderr, refused.output
    configure(tmp_path, train="a")
    assert train(tmp_path, "--resume", str(tmp_path / "out/checkpoint-2")).exit_code == 0
    (tmp_path / "a/shard-00000.tokens").write_bytes(b"cut")
    refused = train(tmp_path, "--resume")
    assert refused.exit_code == 2 and "shard-00000.tokens has 3 bytes instead of" in refused.stderr
