"""Blocks from shards are those of the same text without shards."""

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ast_sparse.data.blocks.domains import Mixture
from ast_sparse.data.blocks.stored import TokenBlocks, split_folders
from ast_sparse.data.build import Blocks
from ast_sparse.data.sources.entries import check_entries
from ast_sparse.data.tokens.shards import Manifest, Shard, ShardFolder
from ast_sparse.errors import UserError
from tests.data.documents import documents
from tests.data.folders import build, edited, shards, write
from tests.models import generated_text


def rows(blocks: Blocks | None) -> list[list[int]]:
    return [] if blocks is None else [[int(token) for token in row["input_ids"]] for row in blocks]


@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.4])
def test_shards_give_the_blocks_of_the_text(tmp_path: Path, share: float) -> None:
    many = documents(60)
    names = [write(tmp_path, "many.jsonl", [*many, " ", *many[:9]]), write(tmp_path, "few.jsonl", documents(75)[70:])]
    folders = [shards(tmp_path, name) for name in names]
    settings: dict[str, Any] = {"eval_share": share, "block_size": 2, "seed": 5}
    text, token = build(tmp_path, *names, **settings), build(tmp_path, *folders, **settings)
    assert isinstance(token[0], TokenBlocks) and not isinstance(text[0], TokenBlocks)
    assert rows(token[0]) == rows(text[0]) and rows(token[1]) == rows(text[1])
    assert len(rows(token[0])) > 100 and bool(rows(token[1])) == bool(share)
    assert str(token[2]) == str(text[2]).replace("many.jsonl", "many").replace("few.jsonl", "few")


def test_shards_and_text_may_stand_side_by_side_as_train_and_eval(tmp_path: Path) -> None:
    train, evaluation = write(tmp_path, "a.jsonl", documents(40)), write(tmp_path, "b.jsonl", documents(60)[40:])
    expected = build(tmp_path, train, eval=(evaluation,))
    mixed = [
        build(tmp_path, shards(tmp_path, train), eval=(evaluation,)),
        build(tmp_path, train, eval=(shards(tmp_path, evaluation),)),
    ]
    for found in mixed:
        assert rows(found[0]) == rows(expected[0]) and rows(found[1]) == rows(expected[1])
    with pytest.raises(UserError, match=r"`data\.train`: a is a folder of shards and b\.jsonl is text"):
        build(tmp_path, "a", "b.jsonl")
    with pytest.raises(UserError, match=r"`calibration\.data`: a is a folder of shards, but text is read here"):
        check_entries(["a"], str(tmp_path), "calibration.data")


def test_blocks_are_read_anywhere_and_survive_pickling(tmp_path: Path) -> None:
    blocks = build(tmp_path, shards(tmp_path, write(tmp_path, "a.jsonl", documents(60))), eval_share=0.1)[0]
    assert isinstance(blocks, TokenBlocks)
    expected = rows(blocks)
    again = pickle.loads(pickle.dumps(blocks))
    assert len(pickle.dumps(blocks)) < 20_000
    for index in np.random.default_rng(0).permutation(len(blocks)).tolist():
        assert again[index]["input_ids"].tolist() == expected[index]
    assert rows(blocks[3:9:2]) == expected[3:9:2] and blocks[-1]["input_ids"].tolist() == expected[-1]
    with pytest.raises(IndexError, match=f"block {len(blocks)} of {len(blocks)}"):
        blocks[len(blocks)]
    assert again.fingerprint == blocks.fingerprint
    others = [build(tmp_path, "a", **{"eval_share": 0.1, **other})[0] for other in ({"seed": 1}, {"block_size": 4})]
    assert len({blocks.fingerprint, *(other.fingerprint for other in others if isinstance(other, TokenBlocks))}) == 3


def test_copy_that_would_leak_into_training_is_refused(tmp_path: Path) -> None:
    text = generated_text(50)
    names = [write(tmp_path, "book.jsonl", [text]), write(tmp_path, "a.jsonl", [*documents(30), text])]
    folders = [shards(tmp_path, name) for name in names]
    with pytest.raises(UserError, match=r"A document of book occurs twice in the training text"):
        build(tmp_path, *folders)
    write(tmp_path, "twice.jsonl", [text, text])
    with pytest.raises(UserError, match=r"A document of twice occurs twice"):
        build(tmp_path, shards(tmp_path, "twice.jsonl"))
    assert build(tmp_path, *folders, eval_share=0)[1] is None


def test_shards_of_another_tokenizer_or_too_short_are_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path, write(tmp_path, "a.jsonl", documents(3)))
    with pytest.raises(UserError, match=r"text of a has \d+ tokens, fewer than one block of `data.block_size` = 9,999"):
        build(tmp_path, folder, block_size=9999, eval_share=0)
    edited(tokenizer_key="0" * 32)(tmp_path / folder)
    with pytest.raises(UserError, match=r"`data\.train`: the shards of a were made with another tokenizer, .*again"):
        build(tmp_path, folder)


def test_blocks_and_order_of_eight_billion_tokens_take_no_memory(tmp_path: Path) -> None:
    shards = [Shard(f"shard-{n:05d}", 1, 0, 61_000_000, 0, 0, 0) for n in range(130)]
    for shard in shards:
        with (tmp_path / f"{shard.name}.tokens").open("wb") as file:
            file.truncate(2 * shard.tokens)  # a hole takes no space on the disk
        (tmp_path / f"{shard.name}.documents").write_bytes(np.array([shard.tokens, 7], dtype="<u8").tobytes())
    manifest = Manifest(
        format_version=1, tokenizer="t", tokenizer_key="k", vocab_size=9, eos_token_id=0, token_type="uint16",
        text_field="text", sources=["x"], text_key="x", shards=shards,
    )  # fmt: skip
    tracemalloc.start()
    ((trains, _),) = split_folders([ShardFolder("big", tmp_path, manifest)], 0.0, 0)
    blocks = TokenBlocks([ShardFolder("big", tmp_path, manifest)], trains, 4096)
    mixture = Mixture({"big": len(blocks)}, (1.0,), 0, 128)
    assert len(blocks) == 1_936_035
    for step in (0, 1, 15_000):
        assert all(len(blocks[int(block)]["input_ids"]) == 4096 for block in mixture.samples(step)[1])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6  # the tokens would take 16 GB, and a list of the blocks 15 MB
