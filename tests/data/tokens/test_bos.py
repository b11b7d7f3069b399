"""BOS before documents and before blocks, against plain loops."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset

from ast_sparse.cli.data import main
from ast_sparse.config import CalibrationConfig, DataConfig
from ast_sparse.config.data import BOS_CHOICES
from ast_sparse.data.blocks import packing
from ast_sparse.data.blocks.collator import CausalLMCollator
from ast_sparse.data.build import build_datasets
from ast_sparse.data.calibration import calibration_blocks, calibration_samples
from ast_sparse.data.pack_dataset import pack_dataset
from ast_sparse.data.tokens.bos import bos_note, find_bos, own_bos
from ast_sparse.data.tokens.shards import MANIFEST, read_manifest, verify_shards
from ast_sparse.errors import UserError
from ast_sparse.evaluation.windows import Stream, cut
from tests.data.bos_models import BOS, EOS, bos_tokenizer, chat, expected_blocks, plain, save_bos_model
from tests.data.documents import documents
from tests.models import tiny_tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (tiny_tokenizer, ()),
        (bos_tokenizer, (BOS,)),
        (lambda: bos_tokenizer(None), ()),  # has a token but does not use it, like GPT-2
        (lambda: bos_tokenizer("<s> $A <|end|>"), (BOS,)),  # the EOS after the text is not added twice
        (lambda: bos_tokenizer("$A <|end|>"), ()),
        (lambda: bos_tokenizer("<s> <|end|> $A"), (BOS, EOS)),  # two tokens, like GLM
        (lambda: bos_tokenizer("<|end|> $A", "<|end|>"), (EOS,)),  # BOS is EOS, like OPT
    ],
)
def test_what_the_tokenizer_does_is_found(tokenizer: Any, expected: tuple[int, ...]) -> None:
    assert own_bos(tokenizer()) == expected
    found = find_bos("auto", tokenizer())
    assert (found.place, found.tokens) == (("document", expected) if expected else ("none", ()))


def test_choices() -> None:
    for choice in ("block", "window"):
        assert find_bos(choice, bos_tokenizer()).of_block == (BOS,)
    assert find_bos("document", bos_tokenizer(None)).of_document == (BOS,)  # though the tokenizer does not add it
    none = find_bos("none", bos_tokenizer())
    assert (none.tokens, none.own) == ((), (BOS,))
    with pytest.raises(UserError, match=r"data.bos='document': the tokenizer of .* has no BOS token"):
        find_bos("document", tiny_tokenizer())
    with pytest.raises(UserError, match="bos='start' is not one of auto, none, document, block, window"):
        find_bos("start", tiny_tokenizer(), "bos")


def save(root: Path, texts: list[str]) -> None:
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def rows(blocks: Any) -> list[list[int]]:
    return [list(map(int, blocks[index]["input_ids"])) for index in range(len(blocks))]


@pytest.mark.parametrize("choice", BOS_CHOICES)
def test_blocks_equal_a_plain_loop_whatever_reads_the_text(tmp_path: Path, choice: str) -> None:
    texts = [*documents(300), " "]
    save(tmp_path, texts)
    place = "document" if choice == "auto" else choice
    expected = expected_blocks(texts, 16, place)
    config = DataConfig(root=str(tmp_path), train=("a.jsonl",), block_size=16, eval_share=0, bos=choice)  # type: ignore[arg-type]
    blocks, _, report = build_datasets(config, bos_tokenizer())
    assert rows(blocks) == expected and report.train is not None
    assert report.train.blocks == len(expected)
    assert report.train.tokens == len(expected) * (15 if place in ("block", "window") else 16) + report.train.leftover
    none = "none; the tokenizer would put <s> before each document"
    where = {"none": none, "document": "<s> before each document"}.get(place, "<s> before each block")
    assert report.lines()[-1] == f"BOS: {where}"
    streamed = build_datasets(DataConfig(**{**config.to_dict(), "streaming": True}), bos_tokenizer())[0]
    assert [row["input_ids"].tolist() for row, _ in zip(streamed, expected, strict=False)] == expected
    packed = pack_dataset(Dataset.from_dict({"text": texts}), bos_tokenizer(), "text", 16, choice)
    assert rows(packed) == expected
    calibration = calibration_blocks(("a.jsonl",), str(tmp_path), "text", bos_tokenizer(), 16, bos=choice)
    assert rows(calibration) == expected
    out = str(tmp_path / "shards")
    save_bos_model(tmp_path / "tokenizer")
    arguments = ["prepare", out, str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--bos", choice]
    result = CliRunner().invoke(main, [*arguments, "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert ("BOS before each document" in result.output) == (place == "document")
    verify_shards(Path(out))
    of_shards = DataConfig(**{**config.to_dict(), "train": (out,)})
    shard_blocks, _, again = build_datasets(of_shards, bos_tokenizer())
    assert rows(shard_blocks) == expected and again.lines() == report.lines()
    info = CliRunner().invoke(main, ["info", out]).output
    assert f"bos             {'82 before each document' if place == 'document' else 'none'}" in info


def test_a_block_that_begins_with_the_end_of_a_document_gets_bos_where_both_are_one_token(tmp_path: Path) -> None:
    texts = documents(300)
    save(tmp_path, texts)
    tokenizer = bos_tokenizer("<|end|> $A", "<|end|>")  # like OPT's
    for size in (12, 13, 16):
        expected = expected_blocks(texts, size, "block", EOS)
        assert any(block[1] == EOS for block in expected)
        config = DataConfig(root=str(tmp_path), train=("a.jsonl",), block_size=size, eval_share=0, bos="block")
        blocks, _, report = build_datasets(config, tokenizer)
        assert rows(blocks) == expected and report.train is not None and report.train.blocks == len(expected)
        streamed = build_datasets(DataConfig(**{**config.to_dict(), "streaming": True}), tokenizer)[0]
        assert [row["input_ids"].tolist() for row, _ in zip(streamed, expected, strict=False)] == expected
    found = find_bos("window", tokenizer)
    stream = Stream([*plain(texts[0]), EOS, *plain(texts[0])], None)
    begins = len(plain(texts[0]))
    first = cut([stream], begins + 1, bos=found)[:2]  # the second one begins with the end of the first document
    assert [window.begin for window in first] == [0, begins] and all(window.front == (EOS,) for window in first)


def test_a_tokenizer_without_bos_is_as_before(tmp_path: Path) -> None:
    texts = documents(60)
    save(tmp_path, texts)
    config = DataConfig(root=str(tmp_path), train=("a.jsonl",), block_size=16, eval_share=0)
    blocks, _, report = build_datasets(config, tiny_tokenizer())
    assert rows(blocks) == expected_blocks(texts, 16, "none") and "BOS" not in str(report)


@pytest.mark.parametrize("choice", ["auto", "block"])
def test_text_that_brings_its_bos_gets_no_second_one(choice: str) -> None:
    data = Dataset.from_dict({"text": ["<s>two of four"] * 3})
    one = [BOS, *plain("two of four"), EOS]
    assert rows(pack_dataset(data, bos_tokenizer(), "text", len(one), choice)) == [one] * 3


def test_bos_is_part_of_the_cache_key(tmp_path: Path) -> None:
    save(tmp_path, documents(60))
    found = {}
    for choice in ("none", "document", "block"):
        config = DataConfig(root=str(tmp_path), train=("a.jsonl",), block_size=16, eval_share=0, bos=choice)  # type: ignore[arg-type]
        found[choice] = build_datasets(config, bos_tokenizer())[0]._fingerprint  # type: ignore[union-attr]
    assert len(set(found.values())) == 3


def prepared(root: Path, choice: str, name: str = "shards") -> Path:
    save(root, documents(300))
    save_bos_model(root / "tokenizer")
    arguments = ["prepare", str(root / name), str(root / "a.jsonl"), "--tokenizer", str(root / "tokenizer")]
    result = CliRunner().invoke(main, [*arguments, "--workers", "1", "--bos", choice])
    assert result.exit_code == 0, result.output
    return root / name


def test_shards_are_read_as_they_were_made_or_refused(tmp_path: Path) -> None:
    bare, begun = prepared(tmp_path, "none", "bare"), prepared(tmp_path, "document", "begun")
    manifest = json.loads((bare / MANIFEST).read_text())
    del manifest["bos"]  # as in older folders
    (bare / MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(bare).bos == [] and read_manifest(begun).bos == [BOS]

    def read(choice: str, *folders: Path) -> Any:
        names = tuple(map(str, folders))
        return build_datasets(
            DataConfig(train=names, block_size=16, eval_share=0, bos=choice),  # type: ignore[arg-type]
            bos_tokenizer(),
        )

    blocks, _, report = read("auto", bare)
    assert rows(blocks) == expected_blocks(documents(300), 16, "none")
    assert report.lines()[-1].startswith("BOS: none; the tokenizer would put <s>")
    assert len({read(choice, bare)[0].fingerprint for choice in ("none", "block")}) == 2
    for choice, folder, message in (
        ("document", bare, "bare have no BOS, and data.bos is document. Make them again .* --bos document, or set"),
        ("none", begun, r"begun begin their documents with BOS \[82\], and data.bos is none.* --bos none, or set"),
        ("block", begun, r"begin their documents with BOS \[82\], and data.bos is block"),
    ):
        with pytest.raises(UserError, match=message):
            read(choice, folder)
    with pytest.raises(UserError, match=r"begun begin their documents with BOS .*, and those of .*bare differ"):
        read("auto", bare, begun)


@pytest.mark.parametrize("makes", [False, True])
def test_shards_whose_bos_also_ends_documents_are_kept_apart_only_if_it_is_known(tmp_path: Path, makes: bool) -> None:
    own = bos_tokenizer("<|end|> $A" if makes else None, bos="<|end|>")
    save(tmp_path, documents(40))
    save_bos_model(tmp_path / "tokenizer")
    own.save_pretrained(tmp_path / "tokenizer")
    arguments = ["prepare", str(tmp_path / "s"), str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    result = CliRunner().invoke(main, [*arguments, "--workers", "1", "--bos", "none" if makes else "document"])
    assert result.exit_code == 0, result.output

    def read(**values: Any) -> Any:
        return build_datasets(DataConfig(train=(str(tmp_path / "s"),), block_size=16, eval_share=0, **values), own)

    message = "set data.bos: none" if makes else r"begin their documents with BOS \[0\], .* set data.bos: document"
    with pytest.raises(UserError, match=message):
        read(packing="documents")
    blocks, _, _ = read(packing="documents", bos="none" if makes else "document")
    assert rows(blocks) == rows(read()[0])


def test_shards_are_not_finished_with_another_bos(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "none")
    arguments = ["prepare", str(folder), str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    result = CliRunner().invoke(main, [*arguments, "--workers", "1"])
    assert result.exit_code == 2 and "shards made with another setting of --bos" in result.output
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "bos": [BOS]}))
    with pytest.raises(UserError, match="does not have the documents its manifest lists"):
        verify_shards(folder)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "bos": ["x"]}))
    with pytest.raises(UserError, match="damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("choice", ["auto", "none", "document", "block"])
def test_a_chat_template_writes_its_own_bos(choice: str) -> None:
    messages = [{"role": "user", "content": "two of"}, {"role": "assistant", "content": " four weights"}]
    data = Dataset.from_dict({"messages": [messages] * 3})
    packed = pack_dataset(data, chat(bos_tokenizer()), "text", 8, choice)
    one = [BOS, *plain("two of"), EOS, *plain(" four weights"), EOS]
    stream, at, expected = one * 3, 0, []
    while True:  # a block that begins a conversation has its BOS
        front = [BOS] if choice == "block" and stream[at : at + 1] != [BOS] else []
        if at + 8 - len(front) > len(stream):
            break
        expected.append(front + stream[at : at + 8 - len(front)])
        at += 8 - len(front)
    assert rows(packed) == expected and len(expected) >= 2
    assert all(row["labels"][0] == -100 or choice != "block" for row in packed)
    for row in packed:
        assert row["position_ids"][0] == 0
        if choice == "block" and row["input_ids"][1] != one[1]:
            assert row["position_ids"][:2] == [0, 1]  # the rest of a conversation continues after BOS


@pytest.mark.parametrize("count", [1, 3, 300])  # 300 conversations are two map batches
def test_the_report_counts_blocks_that_bring_their_bos(
    tmp_path: Path, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [[{"role": role, "content": text} for role in ("user", "assistant")] for text in documents(count)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    stream = [token for text in documents(count) for token in (BOS, *(2 * [*plain(text), EOS]))]
    blocks = at = 0
    while at < len(stream) and (end := at + 8 - (stream[at] != BOS)) <= len(stream):  # it takes 8 if it begins with BOS
        blocks, at = blocks + 1, end
    config = DataConfig(root=str(tmp_path), train=("a.jsonl",), block_size=8, eval_share=0, bos="block")
    found, _, report = build_datasets(config, chat(bos_tokenizer()))
    assert report.train is not None and len(found) == report.train.blocks == blocks
    assert (report.train.tokens, report.train.leftover) == (len(stream), len(stream) - at)
    with pytest.MonkeyPatch.context() as patch:  # the second time, no text is read
        patch.setattr(packing, "_ranges", lambda *args: pytest.fail("the text was read again"))
        assert build_datasets(config, chat(bos_tokenizer()))[2] == report
    assert rows(pack_dataset(Dataset.from_dict({"messages": turns}), chat(bos_tokenizer()), "text", 8, "block"))
    logged = f"{len(stream):,} tokens make {blocks:,} blocks of 8; the last {len(stream) - at:,} tokens do not"
    assert any(logged in record.getMessage() for record in caplog.records) == (at < len(stream))


def test_a_chat_one_token_shorter_than_a_block_with_its_own_bos_is_refused(tmp_path: Path) -> None:
    messages = [{"role": role, "content": "two of"} for role in ("user", "assistant")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    size = 1 + 2 * len([*plain("two of"), EOS])
    config = DataConfig(root=str(tmp_path), train=("a.jsonl",), block_size=size + 1, eval_share=0, bos="block")
    with pytest.raises(UserError, match=rf"text of a.jsonl has {size} tokens, fewer than one block"):
        build_datasets(config, chat(bos_tokenizer()))
    with pytest.raises(UserError, match=f"data set has {size} tokens, fewer than one block"):
        pack_dataset(Dataset.from_dict({"messages": [messages]}), chat(bos_tokenizer()), "text", size + 1, "block")


def test_prompts_of_plain_text_begin_as_documents_do() -> None:
    data = Dataset.from_dict({"prompt": ["two of"] * 4, "completion": [" four"] * 4})
    row = [*plain("two of four"), EOS]
    for choice, begin in (("auto", [BOS]), ("none", []), ("document", [BOS])):
        packed = pack_dataset(data, bos_tokenizer(), "text", len(begin + row), choice)
        assert rows(packed) == [begin + row] * 4
        counted = len(plain(" four")) + 1
        assert packed[0]["labels"] == [-100] * (len(begin + row) - counted) + (begin + row)[-counted:]


@pytest.mark.parametrize("bos", [BOS, EOS])
@pytest.mark.parametrize("place", ["document", "block"])
def test_documents_that_are_kept_apart_begin_with_bos(bos: int, place: str) -> None:
    texts = ["two of four", "the sparse model", "late", "weights move"]
    blocks = expected_blocks(texts, 7, place, bos)
    batch = CausalLMCollator(None, EOS, bos)([{"input_ids": block} for block in blocks])
    for block, positions, labels in zip(blocks, batch["position_ids"].tolist(), batch["labels"].tolist(), strict=True):
        begins = [0]
        for at in range(1, len(block)):
            ended = block[at - 1] == EOS and not (bos == EOS and is_bos(block, at - 1))
            begins += [at] if ended else []
        expected = [at - max(begin for begin in begins if begin <= at) for at in range(len(block))]
        assert positions == expected
        assert labels == [-100 if at in begins else token for at, token in enumerate(block)]
    assert any(0 in positions[1:] for positions in batch["position_ids"].tolist())


def is_bos(block: list[int], at: int) -> bool:
    """If BOS and EOS are one token: the second of two in a row, or a single one at the start of a block."""
    return block[at - 1] == EOS if at else block[1] != EOS


def test_calibration_windows_begin_with_bos_whatever_their_length() -> None:
    stream = torch.arange(100, 190)
    blocks = [{"input_ids": [BOS, *stream[at : at + 15].tolist()]} for at in range(0, 90, 15)]
    samples = calibration_samples(blocks, CalibrationConfig(samples=9, seq_len=11), (BOS,))
    assert samples.shape == (9, 11) and (samples[:, 0] == BOS).all()
    assert sorted(samples[:, 1:].flatten().tolist()) == stream.tolist()


@pytest.mark.parametrize(
    ("choice", "message"), [("auto", "start of each document"), ("none", "is nowhere"), ("window", None)]
)
def test_a_note_says_where_windows_have_none(choice: str, message: str | None) -> None:
    note: Callable[[Any], str | None] = lambda tokenizer: bos_note(choice, tokenizer)  # noqa: E731
    assert note(bos_tokenizer()) is None if message is None else message in str(note(bos_tokenizer()))
    if choice != "window":
        assert note(tiny_tokenizer()) is None
        assert str(bos_note(choice, bos_tokenizer(), "data.bos")).endswith("need data.bos=window.")
