"""Sources to training and held-out blocks: the splits never overlap, and whatever is left out is reported."""

import copy
import dataclasses
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

import ast_sparse
from ast_sparse.config import DataConfig
from ast_sparse.data.blocks.held_out import FEW_DOCUMENTS
from ast_sparse.data.build import DataReport, build_datasets, training_tokens
from ast_sparse.data.pack_dataset import pack_dataset
from ast_sparse.errors import UserError
from tests.data.documents import cut, documents, stream
from tests.data.folders import lines, write
from tests.models import generated_text, tiny_tokenizer


def build(folder: Path, *train: Any, **settings: Any) -> tuple[list[list[int]], list[list[int]] | None, DataReport]:
    config = DataConfig(root=str(folder), train=train, **{"block_size": 8, **settings})
    blocks, held_out, report = build_datasets(config, tiny_tokenizer())
    return blocks["input_ids"][:], None if held_out is None else held_out["input_ids"][:], report


def as_documents(blocks: list[list[int]]) -> list[str]:
    """The whole documents of a stream of blocks of one token each."""
    text = tiny_tokenizer().decode([token for block in blocks for token in block])
    return text.split("<|end|>")[:-1]


def test_the_setting_says_from_how_many_documents_on_whole_ones_are_held_out() -> None:
    (setting,) = (item for item in dataclasses.fields(DataConfig) if item.name == "eval_share")
    page = (Path(ast_sparse.__file__).parent / "data" / "README.md").read_text(encoding="utf-8")
    assert all(f"fewer than {FEW_DOCUMENTS} documents" in text for text in (setting.metadata["help"], page))


def test_held_out_documents_are_whole_and_never_train(tmp_path: Path) -> None:
    texts = documents(120)
    train, held_out, report = build(tmp_path, write(tmp_path, "a.jsonl", texts), eval_share=0.1, block_size=2)
    assert held_out is not None and report.eval is not None
    assert report.train.documents == 108 and report.eval.documents == 12
    parts = [as_documents(train), as_documents(held_out)]
    assert not set(parts[0]) & set(parts[1])
    # what is missing of the documents is the leftover of less than one block
    assert len(set(parts[0]) | set(parts[1])) >= 118 and set(parts[0]) | set(parts[1]) <= set(texts)


def test_choice_depends_on_text_and_seed_and_not_on_order() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**63, 1000).astype(np.uint64)
    lengths = rng.integers(1, 9, 1000)
    (cuts,) = training_tokens([keys], [lengths], ["a"], 0.07, 0)
    assert np.count_nonzero(cuts == 0) == 70 and (cuts[cuts > 0] == lengths[cuts > 0]).all()
    order = rng.permutation(1000)
    (shuffled,) = training_tokens([keys[order]], [lengths[order]], ["a"], 0.07, 0)
    assert (shuffled == cuts[order]).all()
    (other,) = training_tokens([keys], [lengths], ["a"], 0.07, 1)
    assert np.count_nonzero((other == 0) & (cuts == 0)) < 20  # 5 by chance


def test_choice_is_unrelated_to_the_order_of_hashes() -> None:
    (cuts,) = training_tokens([np.arange(10_000, dtype=np.uint64)], [np.ones(10_000, np.int64)], ["a"], 0.5, 0)
    assert abs(np.count_nonzero(cuts[:5000]) - 2500) < 150  # 6 standard deviations


def test_copies_of_a_document_fall_on_one_side_even_in_other_sources(tmp_path: Path) -> None:
    texts = documents(40)
    names = [write(tmp_path, "a.jsonl", texts * 3), write(tmp_path, "b.jsonl", texts[:30]), "c.jsonl"]
    write(tmp_path, "c.jsonl", documents(70)[40:])
    train, held_out, report = build(tmp_path, *names, eval_share=0.1, block_size=2)
    assert held_out is not None and report.eval is not None
    assert not set(as_documents(train)) & set(as_documents(held_out))
    assert [source.documents % 3 for source in report.eval.sources[:1]] == [0]
    assert report.eval.sources[0].documents >= 12 and report.eval.sources[2].documents == 3


def test_every_source_gives_its_share(tmp_path: Path) -> None:
    names = [write(tmp_path, "a.jsonl", documents(100)), write(tmp_path, "b.jsonl", documents(150)[100:])]
    report = build(tmp_path, *names, eval_share=0.05)[2]
    assert report.eval is not None
    assert [(s.name, s.documents) for s in report.eval.sources] == [("a.jsonl", 5), ("b.jsonl", 3)]


def test_of_few_documents_the_end_is_held_out(tmp_path: Path) -> None:
    texts = documents(5, sentences=9)
    train, held_out, report = build(tmp_path, write(tmp_path, "a.jsonl", texts), eval_share=0.25)
    tokens = stream(texts)
    border = len(tokens) - -(-len(tokens) // 4)
    assert train == cut(tokens[:border], 8) and held_out == cut(tokens[border:], 8)
    assert report.train.documents + (report.eval.documents if report.eval else 0) == 6  # one is cut in two


def test_copy_that_would_leak_into_training_is_refused(tmp_path: Path) -> None:
    text = generated_text(50)
    (tmp_path / "book.txt").write_text(text)
    names = ["book.txt", write(tmp_path, "a.jsonl", [*documents(30), text])]
    with pytest.raises(UserError, match=r"A document of book.txt occurs twice in `data.train`"):
        build(tmp_path, *names)
    with pytest.raises(UserError, match="occurs twice"):
        build(tmp_path, "book.txt", "book.txt")
    assert build(tmp_path, "book.txt", "book.txt", eval_share=0)[1] is None


def test_without_a_share_all_text_trains(tmp_path: Path) -> None:
    texts = documents(40)
    train, held_out, report = build(tmp_path, write(tmp_path, "a.jsonl", texts), eval_share=0)
    assert train == cut(stream(texts), 8)
    assert held_out is None and report.eval is None and "held out: nothing" in report.lines()


@pytest.mark.parametrize("streaming", [False, True])
def test_text_is_read_from_the_field_of_the_settings(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"body": text, "text": "no"} for text in documents(9))))
    config = DataConfig(
        root=str(tmp_path), train=("a.jsonl",), text_field="body", eval_share=0, block_size=8, streaming=streaming
    )
    blocks, _, _ = build_datasets(config, tiny_tokenizer())
    expected = cut(stream(documents(9)), 8)
    assert [list(row["input_ids"]) for row in islice(iter(blocks), len(expected))] == expected


def test_named_eval_sources_leave_training_whole(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text(generated_text(9, seed=77))
    texts = documents(40)
    train, held_out, _ = build(tmp_path, write(tmp_path, "a.jsonl", texts), eval=("val.txt",))
    assert train == cut(stream(texts), 8)
    assert held_out == cut(stream([generated_text(9, seed=77)]), 8)


def test_sources_are_packed_across_their_border(tmp_path: Path) -> None:
    names = [write(tmp_path, "a.jsonl", documents(3)), write(tmp_path, "b.jsonl", documents(30)[3:])]
    assert build(tmp_path, *names, eval_share=0)[0] == cut(stream(documents(30)), 8)


def test_report_counts_every_token(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(generated_text(30))
    train, held_out, report = build(tmp_path, write(tmp_path, "a.jsonl", ["", *documents(40)]), "b.txt", block_size=16)
    total = len(stream([*documents(40), generated_text(30)]))
    assert report.eval is not None and held_out is not None
    assert report.train.tokens + report.eval.tokens == total
    for split, blocks in ((report.train, train), (report.eval, held_out)):
        assert split.tokens == split.blocks * 16 + split.leftover and 0 <= split.leftover < 16
        assert split.blocks == len(blocks)
        assert split.tokens == sum(source.tokens for source in split.sources)
    assert report.empty_documents == 1
    text = str(report)
    assert f"blocks of 16, {report.train.leftover} tokens left over" in text and "empty documents left out: 1" in text
    assert f"  b.txt: 1 document, {report.train.sources[1].tokens:,} tokens" in text


def test_second_run_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.jsonl", documents(50))
    tokenizer = copy.deepcopy(tiny_tokenizer())
    calls: list[int] = []
    kind = type(tokenizer)
    tokenise = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **k: calls.append(1) or tokenise(self, *a, **k))

    def run(**settings: Any) -> tuple[list[str], int]:
        calls.clear()
        config = DataConfig(root=str(tmp_path), train=("a.jsonl",), **{"block_size": 8, **settings})
        parts = build_datasets(config, copy.deepcopy(tokenizer))[:2]
        return [file["filename"] for part in parts if part is not None for file in part.cache_files], len(calls)

    files, count = run()
    assert count == 1 and len(files) == 2
    tokenizer(["used"], truncation=True, max_length=2)  # changes the state of the tokenizer, not the tokens
    assert run() == (files, 0)
    other, count = run(block_size=16, seed=3, eval_share=0.1)
    assert count == 0 and not set(files) & set(other)
    write(tmp_path, "a.jsonl", documents(51))
    assert run()[1] == 1


@pytest.mark.parametrize("column", ["text", "messages"])
def test_a_source_without_rows_is_named(tmp_path: Path, column: str) -> None:
    pq.write_table(pa.table({column: pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no rows\. Remove it, or give it text\.$"):
        build_datasets(DataConfig(root=str(tmp_path), train=("a.parquet",), block_size=8), tiny_tokenizer())
    with pytest.raises(UserError, match=r"has no rows\. Remove it, or give it text\.$"):
        pack_dataset(Dataset.from_dict({column: []}), tiny_tokenizer(), column, 8)


def test_text_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the sparse model")
    with pytest.raises(
        UserError, match=r"text of a.txt has \d+ tokens, fewer than one block of `data.block_size` = 64"
    ):
        build(tmp_path, "a.txt", block_size=64, eval_share=0)
    write(tmp_path, "b.jsonl", documents(40))
    with pytest.raises(UserError, match=r"held out of b.jsonl \(`data.eval_share` = 0.02\) has \d+ tokens"):
        build(tmp_path, "b.jsonl", block_size=64)
    with pytest.raises(UserError, match=r"text of a.txt has .* Give more text in `data.eval`"):
        build(tmp_path, "b.jsonl", block_size=64, eval=("a.txt",))
