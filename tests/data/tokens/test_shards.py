"""Text to shards and back: the tokens are those of the text, whatever wrote them and however often that was stopped."""

import copy
import errno
import json
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ast_sparse.cli.data import main
from ast_sparse.data.tokens import prepare
from ast_sparse.data.tokens.prepare import prepare_shards
from ast_sparse.data.tokens.shard_writer import Tokeniser, TokeniserSettings, text_key, write_shard
from ast_sparse.data.tokens.shards import (
    MANIFEST,
    PROGRESS,
    Manifest,
    Shard,
    file_crc32,
    open_documents,
    open_tokens,
    read_manifest,
    token_type,
    verify_shards,
)
from ast_sparse.errors import UserError
from tests.data.documents import documents, stream
from tests.data.folders import edited, lines, settings, zstd
from tests.models import generated_text, save_tiny_model, tiny_tokenizer
from tests.processes import run_command


def tokens_of(folder: Path) -> list[int]:
    manifest = read_manifest(folder)
    return [int(token) for shard in manifest.shards for token in open_tokens(folder, manifest, shard)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """40 documents, one of them empty, in three files."""
    texts = [*documents(39), " "]
    rows = [{"text": text} for text in texts]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows[:10]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(lines(*rows[10:30])))
    (tmp_path / "c.jsonl").write_bytes(lines(*rows[30:]))
    return texts


SOURCES = ("a.jsonl", "b.jsonl.zst", "c.jsonl")


def test_shards_hold_the_tokens_of_the_text_and_where_documents_end(tmp_path: Path, texts: list[str]) -> None:
    manifest = prepare_shards(tmp_path / "out", settings(tmp_path, *SOURCES), tiny_tokenizer())
    assert manifest == read_manifest(tmp_path / "out") == verify_shards(tmp_path / "out")
    assert len(manifest.shards) > 3 and manifest.token_type == "uint16"
    assert tokens_of(tmp_path / "out") == stream(texts)
    assert (manifest.documents, manifest.empty, manifest.tokens) == (40, 1, len(stream(texts)))
    assert max(shard.largest_token for shard in manifest.shards) == max(stream(texts))
    lengths, keys = [], []
    for shard in manifest.shards:
        ends, found = open_documents(tmp_path / "out", shard)
        assert ends[-1] == shard.tokens and len(ends) == shard.documents
        lengths += np.diff(ends.astype(int), prepend=0).tolist()
        keys += found.tolist()
    assert lengths == [len(stream([text])) if text.strip() else 0 for text in texts]
    assert keys == [text_key(text) for text in texts]
    assert text_key("two") == 218224992319827701  # stored: another hash would hold out other documents


def test_tokens_are_mapped_and_not_copied(tmp_path: Path, texts: list[str]) -> None:
    manifest = prepare_shards(tmp_path / "out", settings(tmp_path, *SOURCES), tiny_tokenizer())
    tokens = open_tokens(tmp_path / "out", manifest, manifest.shards[0])
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
    assert isinstance(open_documents(tmp_path / "out", manifest.shards[0])[0], np.memmap)


def test_two_processes_write_what_one_writes(tmp_path: Path, texts: list[str]) -> None:
    for workers, folder in ((1, "one"), (2, "two")):
        prepare_shards(tmp_path / folder, settings(tmp_path, *SOURCES, workers=workers), tiny_tokenizer())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_token_type_is_chosen_by_the_vocabulary(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [token_type(size) for size in (2**16, 2**16 + 1)] == ["uint16", "uint32"]
    monkeypatch.setattr(prepare, "token_type", lambda size: "uint32")
    assert prepare_shards(tmp_path / "out", settings(tmp_path, *SOURCES), tiny_tokenizer()).token_type == "uint32"
    assert tokens_of(tmp_path / "out") == stream(texts)


def test_batches_make_no_difference(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_shards(tmp_path / "whole", settings(tmp_path, *SOURCES), tiny_tokenizer())
    monkeypatch.setattr(prepare, "_BATCH_CHARACTERS", 70)
    prepare_shards(tmp_path / "pieces", settings(tmp_path, *SOURCES), tiny_tokenizer())
    assert contents(tmp_path / "whole") == contents(tmp_path / "pieces")


def test_what_is_read_ahead_is_bounded(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read, waiting, most = [0], [0], [0]
    documents = prepare.iterate_documents

    def counting(*args: Any) -> Iterator[tuple[str, str]]:
        for document in documents(*args):
            read[0] += 1
            most[0] = max(most[0], read[0] - waiting[0])
            yield document

    class AtOnce:
        def __init__(self, *args: Any) -> None: ...

        def submit(self, function: Any, batch: list[str]) -> "Future[Any]":
            future: Future[Any] = Future()
            future.set_result(tokeniser(batch))
            return future

        def shutdown(self, **kwargs: Any) -> None: ...

    tokeniser = Tokeniser(TokeniserSettings(tokenizer=pickle.dumps(tiny_tokenizer()), eos_token_id=0, token_type="<u2"))
    monkeypatch.setattr(prepare, "iterate_documents", counting)
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", AtOnce)
    monkeypatch.setattr(prepare, "_BATCH_CHARACTERS", 1)  # a document each

    def written(tokens: int) -> None:
        waiting[0] += 1

    prepare_shards(tmp_path / "out", settings(tmp_path, *SOURCES, workers=2), tiny_tokenizer(), progress=written)
    assert waiting[0] == len(texts) and most[0] == 2 * prepare._AHEAD + 1


def test_a_document_longer_than_a_shard_is_refused_and_can_be_kept(tmp_path: Path) -> None:
    long, short = generated_text(60), "two of four " * 20
    save_tiny_model(tmp_path / "model")
    rows = [short, short, short, long, "of"]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"body": text, "text": "no"} for text in rows)))
    arguments = ["prepare", str(tmp_path / "out"), "a.jsonl", "--root", str(tmp_path), "--workers", "1"]
    arguments += ["--text-field", "body"]
    arguments += ["--tokenizer", str(tmp_path / "model"), "--shard-size", "0.0004"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    reason = f"a.jsonl, line 4: a document of {len(long):,} characters is longer than a shard of 400 (--shard-size)"
    assert reason in result.stderr
    names = ["prepare.json", "shard-00000.documents", "shard-00000.tokens"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    result = CliRunner().invoke(main, [*arguments, "--keep-long"])
    assert result.exit_code == 0 and "(1 of them from an earlier run)" in result.output, result.output
    assert [shard.documents for shard in verify_shards(tmp_path / "out").shards] == [1, 1, 1, 1, 1]
    assert tokens_of(tmp_path / "out") == stream(rows)


def test_killed_preparation_goes_on_and_makes_the_same_shards(tmp_path: Path, texts: list[str]) -> None:
    save_tiny_model(tmp_path / "model")
    prepare_shards(tmp_path / "whole", settings(tmp_path, *SOURCES), tiny_tokenizer())
    out = tmp_path / "out"
    arguments = ["prepare", str(out), *SOURCES, "--root", str(tmp_path), "--tokenizer", str(tmp_path / "model")]
    arguments += ["--shard-size", "0.0004", "--workers", "1"]
    done = run_command([sys.executable, "-m", "tests.data.tokens.killed", *arguments])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(path.name.endswith(".tmp") for path in out.iterdir()) and not (out / MANIFEST).exists()
    with pytest.raises(UserError, match=r"out is unfinished\. Run the same ast-data prepare again"):
        read_manifest(out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-0000[01].*")}
    assert len(kept) == 4
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "(2 of them from an earlier run)" in result.output, result.output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    ours, theirs = contents(out), contents(tmp_path / "whole")
    manifests = [json.loads(content.pop(MANIFEST)) for content in (ours, theirs)]
    assert ours == theirs and manifests[0]["shards"] == manifests[1]["shards"]
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 0 and "already complete" in again.output


def test_full_disk_keeps_finished_shards_and_leaves_nothing_half_written(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 7:  # two files and a list for each shard
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"out: No space left on device\. Free some space and run the same command"):
            prepare_shards(out, settings(tmp_path, *SOURCES), tiny_tokenizer())
    names = ["shard-00000.documents", "shard-00000.tokens", "shard-00001.documents", "shard-00001.tokens"]
    assert sorted(path.name for path in out.iterdir()) == [PROGRESS, *names]
    new: list[bool] = []
    prepare_shards(
        out, settings(tmp_path, *SOURCES), tiny_tokenizer(), finished=lambda shard, is_new: new.append(is_new)
    )
    assert new[:3] == [False, False, True] and tokens_of(out) == stream(texts)


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[3] ^= 1
        (folder / name).write_bytes(content)

    return damage


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (cut("shard-00001.tokens", 10), r"shard-00001\.tokens has 10 bytes instead of \d+\. Copy it again"),
    (cut("shard-00000.documents", 8), r"shard-00000\.documents has 8 bytes instead of \d+"),
    (lambda folder: (folder / "shard-00002.tokens").unlink(), r"shard-00002\.tokens is missing"),
    (cut(MANIFEST, 50), r"manifest\.json cannot be read or is damaged"),
    (edited(format_version=2), r"manifest\.json has format_version 2, .* reads up to 1\. Update ast_sparse"),
    (edited(token_type="float64"), r"manifest\.json cannot be read or is damaged"),
    (edited(shards=[]), r"lists no shards"),
    (edited(shards=[{"name": "../x"}]), r"manifest\.json cannot be read or is damaged"),
    (lambda folder: (folder / MANIFEST).unlink(), r"is not a folder of shards: it has no manifest\.json"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    (root / "a.jsonl").write_bytes(lines(*({"text": text} for text in documents(39))))
    prepare_shards(root / "out", settings(root, "a.jsonl"), tiny_tokenizer())
    return root / "out"


def copied(whole: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda case: case if isinstance(case, str) else "")
def test_damaged_folder_is_named(tmp_path: Path, whole: Path, damage: Callable[[Path], Any], message: str) -> None:
    folder = copied(whole, tmp_path / "out")
    damage(folder)
    result = CliRunner().invoke(main, ["info", str(folder)])
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    with pytest.raises(UserError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["shard-00001.tokens", "shard-00001.documents"])
def test_verify_finds_a_changed_bit(tmp_path: Path, whole: Path, name: str) -> None:
    folder = copied(whole, tmp_path / "out")
    assert CliRunner().invoke(main, ["verify", str(folder)]).exit_code == 0
    flip(name)(folder)
    read_manifest(folder)  # sizes are right
    result = CliRunner().invoke(main, ["verify", str(folder)])
    assert result.exit_code == 2 and f"{name} is damaged: its checksum differs" in result.stderr


def test_verify_finds_borders_that_are_none(tmp_path: Path, whole: Path) -> None:
    folder = copied(whole, tmp_path / "out")
    flip("shard-00000.documents")(folder)
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    shards[0]["documents_crc32"] = file_crc32(folder / "shard-00000.documents")
    edited(shards=shards)(folder)
    with pytest.raises(UserError, match="shard-00000 does not have the documents its manifest lists"):
        verify_shards(folder)


def test_shards_of_other_text_or_tokenizer_are_not_continued(tmp_path: Path, texts: list[str]) -> None:
    out = tmp_path / "out"

    def attempt(message: str, tokenizer: Any = None, **values: Any) -> None:
        with pytest.raises(UserError, match=message):
            prepare_shards(out, settings(tmp_path, *SOURCES, **values), tokenizer or tiny_tokenizer())

    prepare_shards(out, settings(tmp_path, *SOURCES), tiny_tokenizer())
    attempt("made with other text.* or another shard size", shard_characters=500)
    attempt("made with another text field", text_field="body")
    other = copy.deepcopy(tiny_tokenizer())
    other.add_tokens(["sparse"])
    attempt("made with another tokenizer", other)
    edited(eos_token_id=5)(out)
    attempt("made with another end-of-sequence token")
    edited(eos_token_id=0)(out)
    with (tmp_path / "c.jsonl").open("ab") as file:
        file.write(lines({"text": "late"}))
    attempt("made with other text")
    manifest = prepare_shards(out, settings(tmp_path, *SOURCES), tiny_tokenizer(), overwrite=True)
    assert manifest.documents == 41 and tokens_of(out) == stream([*texts, "late"])


REFUSED: list[tuple[list[str], str]] = [
    (["out"], r"Name text either as SOURCE or as --domain"),
    (["out", "a.jsonl", "--domain", "cc=a.jsonl"], r"Name text either as SOURCE or as --domain"),
    (["out", "--domain", "a.jsonl"], r"--domain 'a\.jsonl' is not of the form NAME=SOURCE"),
    (["out", "--domain", "../cc=a.jsonl"], r"is not of the form NAME=SOURCE"),
    (["out", "none.jsonl"], r"`SOURCE`: file none\.jsonl does not exist"),
    (["out", "bad.jsonl"], r"bad\.jsonl, line 2: not UTF-8 \(byte 0xff"),
    (["out", "blank.jsonl"], r"blank\.jsonl has no text"),
    (["out", "{path: no/such}"], r"Cannot load data set no/such"),
    (["out", "{path: [}"], r"SOURCE .* is not valid YAML"),
    (["out", "a.jsonl", "--text-field", "body"], r"no field `body`, only text"),
    (["out", "chat.jsonl"], r"line 1: no field `text`, only messages\. This is chat data, but raw text is read here"),
    (
        ["out", "a.jsonl", "--shard-size", "1e-6"],
        r"a\.jsonl, line 1: a document of 3 characters is longer than a shard",
    ),
    (["out", "--domain", "cc=blank.jsonl"], r"blank\.jsonl has no text"),
    (["file", "a.jsonl"], r"file is a file\. Name a folder"),
    (["full", "a.jsonl"], r"full already has other files"),
    (["out", "a.jsonl", "--workers", "0"], r"Invalid value for '--workers'"),
    (["out", "a.jsonl", "--shard-size", "0"], r"Invalid value for '--shard-size'"),
    (["out", "a.jsonl", "--tokenizer", "/nowhere"], r"/nowhere"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda case: " ".join(case) if case[0] == "out" else "")
def test_wrong_input_of_prepare_is_one_line_and_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "two"}))
    (tmp_path / "bad.jsonl").write_bytes(lines({"text": "two"}) + b'{"text": "\xff"}\n')
    (tmp_path / "blank.jsonl").write_bytes(lines({"text": " "}))
    (tmp_path / "chat.jsonl").write_bytes(lines({"messages": []}))
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("x")
    result = CliRunner().invoke(main, ["prepare", "--workers", "1", "--tokenizer", "model", *arguments])
    assert result.exit_code == 2 and result.stderr.startswith("Error: "), result.output
    assert result.stderr.count("\n") == 1 and re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob(MANIFEST)) + list(tmp_path.rglob("*.tmp"))


def test_info_shows_counts_and_tokenizer(whole: Path) -> None:
    result = CliRunner().invoke(main, ["info", str(whole)])
    manifest: Manifest = read_manifest(whole)
    assert result.exit_code == 0
    for part in (f"{manifest.tokens:,} as uint16", "documents       39, 0 of them empty", manifest.tokenizer_key):
        assert part in result.output


def test_tokeniser_ends_every_document_and_refuses_tokens_that_do_not_fit(tmp_path: Path) -> None:
    state = tiny_tokenizer().backend_tokenizer.to_str()
    tokeniser = Tokeniser(TokeniserSettings(tokenizer=state, eos_token_id=70_000, token_type="uint16"))
    with pytest.raises(OverflowError, match="token 70000 does not fit uint16"):
        write_shard(tmp_path, "shard-00000", map(tokeniser, [["two"]]))
    assert list(tmp_path.iterdir()) == []
    pickled = TokeniserSettings(tokenizer=pickle.dumps(tiny_tokenizer()), eos_token_id=0, token_type="uint16")
    shard: Shard = write_shard(tmp_path, "shard-00000", map(Tokeniser(pickled), [["two of"], ["four", " "]]))
    assert np.fromfile(tmp_path / "shard-00000.tokens", dtype="<u2").tolist() == stream(["two of", "four"])
    assert (shard.documents, shard.empty) == (3, 1)


def test_special_tokens_are_split_in_shards_if_the_tokenizer_splits_them(tmp_path: Path) -> None:
    text = "two<|end|> of"
    (tmp_path / "a.jsonl").write_bytes(lines({"text": text}))
    found = {}
    for splits in (False, True):
        tokenizer = copy.deepcopy(tiny_tokenizer())
        tokenizer.split_special_tokens = splits
        manifest = prepare_shards(tmp_path / f"{splits}", settings(tmp_path, "a.jsonl"), tokenizer)
        found[splits] = (tokens_of(tmp_path / f"{splits}"), manifest.tokenizer_key)
        assert found[splits][0] == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert found[False][0] != found[True][0] and found[False][1] != found[True][1]
