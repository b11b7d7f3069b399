"""A stream has the blocks of the text, and a run on it resumes at the next one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from ast_sparse.cli.train import main
from ast_sparse.config import DataConfig
from ast_sparse.data.blocks.streaming import StreamedBlocks
from ast_sparse.data.build import build_datasets
from ast_sparse.errors import UserError
from ast_sparse.run import checks
from tests.data.documents import cut, documents, stream
from tests.data.folders import write
from tests.models import save_tiny_model, tiny_model, tiny_tokenizer


def streamed(folder: Path, *train: Any, **settings: Any) -> tuple[StreamedBlocks, Any]:
    config = DataConfig(root=str(folder), train=train, streaming=True, **{"block_size": 8, "eval_share": 0, **settings})
    blocks, held_out, _ = build_datasets(config, tiny_tokenizer())
    assert isinstance(blocks, StreamedBlocks)
    return blocks, held_out


def test_a_stream_gives_the_blocks_of_its_documents_again_and_again(tmp_path: Path) -> None:
    texts = documents(150)
    name = write(tmp_path, "a.jsonl", [*texts[:100], " "])
    hub = {"path": "json", "data_files": str(tmp_path / write(tmp_path, "b.jsonl", texts[100:]))}
    for size in (8, 1000):
        blocks, _ = streamed(tmp_path, name, hub, block_size=size)
        expected = cut(stream([*texts, *texts, *texts[:20]]), size)  # read again when it ends
        assert [row["input_ids"].tolist() for row in islice(blocks, len(expected))] == expected
        assert next(iter(blocks))["input_ids"].tolist() == expected[0]


def test_a_stream_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the stream ends after \d+ tokens, fewer than one block .* = 9,999"):
        streamed(tmp_path, write(tmp_path, "a.jsonl", documents(3)), block_size=9999)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_looks_for_tokens_without_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    blocks, _ = streamed(tmp_path, write(tmp_path, "a.jsonl", documents(20)))
    model, shared = tiny_model(), []
    model.config.vocab_size = 3

    @contextmanager
    def errors_shared() -> Iterator[None]:
        shared.append(True)
        yield

    monkeypatch.setattr(checks, "rank", lambda: rank)
    monkeypatch.setattr(checks, "errors_shared", errors_shared)
    refused = pytest.raises(UserError, match=r"the tokenizer makes the token .* has only 3 embeddings")
    with refused if rank == 0 else nullcontext():
        checks.check_token_ids(blocks, tiny_tokenizer(), model, None, False)
    assert shared and blocks.embeddings == 3  # when it comes to the token


@pytest.mark.parametrize("fault", ["makes the token", "UTF-8"])
def test_an_error_of_a_stream_is_one_line_in_a_worker_too(tmp_path: Path, fault: str) -> None:
    blocks, _ = streamed(tmp_path, write(tmp_path, "a.jsonl", documents(20)))
    if fault == "UTF-8":
        with (tmp_path / "a.jsonl").open("ab") as file:
            file.write(b'{"text": "\xff"}\n')
    else:
        blocks.embeddings = 3
    said = []
    for workers in (0, 1):
        with pytest.raises(UserError) as refused:
            list(islice(DataLoader(blocks, batch_size=None, num_workers=workers), 10_000))
        said.append(str(refused.value))
    assert said[0] == said[1] and fault in said[0] and "\n" not in said[0]


def test_held_out_text_of_a_stream_is_read_as_usual(tmp_path: Path) -> None:
    texts = documents(60)
    names = [write(tmp_path, "a.jsonl", texts[:40]), write(tmp_path, "b.jsonl", texts[40:])]
    _, held_out = streamed(tmp_path, names[0], eval=(names[1],))
    assert held_out["input_ids"][:] == cut(stream(texts[40:]), 8)


def test_a_run_on_a_stream_resumes_at_the_very_next_block(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    write(tmp_path, "a.jsonl", documents(60))
    write(tmp_path, "b.jsonl", documents(80)[60:])
    config = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {
            "root": str(tmp_path), "train": "a.jsonl", "eval": "b.jsonl", "block_size": 16, "streaming": True,
        },
        "sparsity": {"mask_interval": 2},
        "training": {
            "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True,
            "report_to": "none", "save_steps": 2, "disable_tqdm": True,
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(config))

    def run(out: str, *options: str) -> dict[str, torch.Tensor]:
        arguments = ["--config", str(tmp_path / "run.yaml"), "--output-dir", str(tmp_path / out), *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert "train: streamed, tokenised during training" in result.output
        return load_file(tmp_path / out / "checkpoint-6/model.safetensors")

    whole = run("whole")
    resumed = run("resumed", "--resume", str(tmp_path / "whole/checkpoint-4"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
