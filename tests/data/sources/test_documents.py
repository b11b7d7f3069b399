"""Files and data sets to documents, and the errors for those that cannot be read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from ast_sparse.config import DataConfig
from ast_sparse.data.sources import text_files as files
from ast_sparse.data.sources.conversations import chat_columns
from ast_sparse.data.sources.documents import iterate_documents, load_documents, read_conversations, read_texts
from ast_sparse.data.sources.entries import check_sources
from ast_sparse.errors import UserError
from tests.data.folders import lines, zstd


def texts(folder: Path, *entries: Any, text_field: str = "text") -> list[list[str]]:
    loaded = load_documents(entries, str(folder), text_field)
    return [source.documents[source.text_field][:] for source in loaded]


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.tokens", "a.md", "a.rst", "README", "wiki.test.raw"])
def test_a_text_file_is_one_document_unchanged(tmp_path: Path, name: str) -> None:
    text = "first line\r\n\nsecond \u2028 line é\n"
    (tmp_path / name).write_bytes(text.encode())
    assert texts(tmp_path, name) == [[text]]


def test_a_jsonl_line_is_one_document(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo", "meta": {"a": 1}}, {"meta": "another type", "text": "é ✓"}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows[0]) + b"\n  \n" + lines(rows[1]))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(*rows)))
    (tmp_path / "lines.json").write_bytes(lines(*rows))
    (tmp_path / "array.json").write_text(" \n" + json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines(rows[0])) + zstd(lines(rows[1])))  # two frames
    expected = ["one\ntwo", "é ✓"]
    names = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "lines.json", "array.json"]
    assert texts(tmp_path, *names) == [expected] * 5
    assert [text for text, _ in iterate_documents(names, str(tmp_path), "text", "data.train")] == expected * 5


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"text": "hello"}))
    assert texts(tmp_path, "a.txt", "a.jsonl") == [["hello"], ["hello"]]


def test_parquet_and_load_dataset_arguments(tmp_path: Path) -> None:
    Dataset.from_dict({"id": [1, 2], "body": ["one", "two"]}).to_parquet(str(tmp_path / "a.parquet"))
    mapping = {"path": "parquet", "data_files": str(tmp_path / "a.parquet")}
    assert texts(tmp_path, "a.parquet", mapping, text_field="body") == [["one", "two"]] * 2


def test_glob_takes_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "deep/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts(tmp_path, "*.txt", "**/*.txt") == [["a", "b"], ["a", "b", "deep/c"]]


def test_file_that_changed_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    assert texts(tmp_path, "a.txt") == [["old"]]
    (tmp_path / "a.txt").write_text("newer")
    assert texts(tmp_path, "a.txt") == [["newer"]]


CHEAP = [  # found without reading a file
    ("missing.txt", {}, r"`data.train`: file missing.txt does not exist under `data.root` = .*\. Correct the name"),
    ("*.jsonl", {}, r"`data.train`: no file matches \*.jsonl under `data.root` = "),
    ("sub", {"sub/x.txt": b"x"}, r"sub is a folder under .* Name its files"),
    ("a.txt", {"a.txt": b""}, r"a\.txt is empty"),
    ("a.csv", {"a.csv": b"x"}, r"a\.csv: files of this kind cannot be read"),
    ("a.parquet.gz", {"a.parquet.gz": b"x"}, "files of this kind cannot be read"),
    ("*", {"a.txt": b"x", "b.jsonl": b"x"}, r"\* matches files of several kinds \(json, text\)"),
    ({"name": "en"}, {}, "names no data set. Give `path`"),
]
READ = [
    ("a.jsonl", {"a.jsonl": lines({"text": "x"}, [1])}, r"a\.jsonl, line 2: not a JSON object but \[1\]"),
    ("a.jsonl", {"a.jsonl": lines({"text": "x"}) + b"\n{text\n"}, r"a\.jsonl, line 3: not JSON"),
    (
        "a.jsonl",
        {"a.jsonl": lines({"text": "x"}, {"body": "x"})},
        r"line 2: no field `text`, only body. Set `text_field`",
    ),
    ("a.jsonl", {"a.jsonl": lines({"text": "x"}, {"text": None})}, "line 2: field `text` is not a string but null"),
    ("a.jsonl", {"a.jsonl": lines({"text": 3})}, "line 1: field `text` is not a string but 3"),
    ("a.jsonl", {"a.jsonl": b'{"text": "\\ud83d"}\n'}, "line 1: .* lone surrogate"),
    ("a.jsonl", {"a.jsonl": lines({"text": "x"}) + b'{"text": "\xff"}\n'}, r"a\.jsonl, line 2: not UTF-8 \(byte 0xff"),
    ("a.jsonl", {"a.jsonl": b"\n \n"}, r"a\.jsonl has no text"),
    ("a.jsonl", {"a.jsonl": lines({"text": ""})}, r"a\.jsonl has no text"),
    ("a.json", {"a.json": b'[{"text": "x"},\n 3]'}, r"a\.json, element 2: not a JSON object but 3"),
    ("a.json", {"a.json": b'[{"text": "x"},\n}'}, r"a\.json, line 2: not JSON"),
    ("a.jsonl.gz", {"a.jsonl.gz": b"no gzip"}, r"a\.jsonl\.gz cannot be read: "),
    ("a.jsonl.gz", {"a.jsonl.gz": gzip.compress(lines({"text": "x" * 99}))[:-9]}, r"a\.jsonl\.gz cannot be read: "),
    ("a.jsonl.zst", {"a.jsonl.zst": b"no frame"}, r"a\.jsonl\.zst cannot be read: ZSTD decompress failed"),
    ("a.jsonl.zst", {"a.jsonl.zst": zstd(lines({"text": "x"}))[:-3]}, r"a\.jsonl\.zst cannot be read: Truncated"),
    ("a.txt", {"a.txt": b"one\ntwo \xe9\n"}, r"a\.txt, line 2: not UTF-8 \(byte 0xe9"),
    ("a.txt", {"a.txt": b" \n"}, r"a\.txt has no text"),
    ("a.bin", {"a.bin": b"x\0y"}, r"a\.bin is not text: it contains NUL bytes"),
    ("*.txt", {"a.txt": b"x", "b.txt": b"\xff"}, r"b\.txt, line 1: not UTF-8"),
    ("a.parquet", {"a.parquet": b"no parquet"}, r"a\.parquet is not a parquet file"),
    ({"path": "nobody/nothing"}, {}, "Cannot load data set nobody/nothing: "),
    ({"path": "text", "data_files": "/no/such/file"}, {}, "Cannot load data set text: "),
]


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(("entry", "files", "message"), CHEAP)
@pytest.mark.parametrize("which", ["train", "eval"])
def test_wrong_entry_is_found_before_anything_is_read(
    tmp_path: Path, which: str, entry: Any, files: dict[str, bytes], message: str
) -> None:
    write(tmp_path, {"good/good.txt": b"x", **files})
    entries = {"train": ("good/good.txt",), "eval": ("good/good.txt",), which: (entry,)}
    with pytest.raises(UserError, match=message.replace("data.train", f"data.{which}")) as caught:
        check_sources(DataConfig(root=str(tmp_path), **entries))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        load_documents([entry], str(tmp_path), "text")


@pytest.mark.parametrize(("entry", "files", "message"), READ)
def test_bad_content_is_named_by_file_and_line(
    tmp_path: Path, entry: Any, files: dict[str, bytes], message: str
) -> None:
    write(tmp_path, files)
    check_sources(DataConfig(root=str(tmp_path), train=(entry,)))
    with pytest.raises(UserError, match=message) as caught:
        load_documents([entry], str(tmp_path), "text")
    assert "\n" not in str(caught.value)


DEEP, LONG_INTEGER = b"[" * 900 + b"]" * 900, b"9" * 5000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": ' + LONG_INTEGER + b"}", r"line 1: not JSON \(Exceeds the limit"),
        (b'{"text": 1e999}', "line 1: field `text` is not a string but Infinity"),
        (b'{"text": NaN}', "line 1: field `text` is not a string but NaN"),
        (b'{"text": ' + DEEP + b"}", r"line 1: (field `text` is not a string but|nested too deeply)"),
        (b"[" * 100_000, "line 1: nested too deeply"),
        (b'{"a\\nb": 1}', r"no field `text`, only 'a\\nb'"),
        (json.dumps({"x" * 10**6: 1}).encode(), "no field `text`, only x+. Set"),
        (json.dumps({str(n): n for n in range(10**5)}).encode(), "no field `text`, only 0, 1, .*, 19. Set"),
    ],
)
def test_absurd_line_is_one_short_message(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_documents(["a.jsonl"], str(tmp_path), "text")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_zero_byte_in_json_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a\0b"}))
    assert texts(tmp_path, "a.jsonl") == [["a\0b"]]


def test_line_and_array_beyond_the_limit_are_refused_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LONGEST_LINE", 1000)
    monkeypatch.setattr(files, "_LARGEST_TEXT_FILE", 1000)
    fits, long = lines({"text": "x" * 900}), lines({"text": "x" * 10**6})
    (tmp_path / "fits.jsonl").write_bytes(fits)
    (tmp_path / "a.jsonl").write_bytes(fits + long)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(long))
    (tmp_path / "array.json").write_bytes(b"[" + long + b"]")
    assert texts(tmp_path, "fits.jsonl") == [["x" * 900]]
    for name, message in (("a.jsonl", "line 2: longer"), ("bomb.jsonl.gz", "line 1: longer"), ("array.json", "larger")):
        with pytest.raises(UserError, match=rf"{name}.* {message} than"):
            load_documents([name], str(tmp_path), "text")


def test_zstandard_without_its_codec_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines({"text": "x"})))
    monkeypatch.setattr(pa, "Codec", type("Codec", (), {"is_available": staticmethod(lambda name: False)}))
    with pytest.raises(UserError, match=r"a\.jsonl\.zst is compressed with Zstandard, which this build"):
        load_documents(["a.jsonl.zst"], str(tmp_path), "text")


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_are_iterated_as_they_are_loaded(tmp_path: Path, streaming: bool) -> None:
    rows = [{"text": f"number {n}", "id": n} for n in range(20)]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    hub = {"path": "json", "data_files": str(tmp_path / "a.jsonl")}
    found = list(
        iterate_documents(["a.parquet", hub, {**hub, "streaming": True}], str(tmp_path), "text", "x", streaming)
    )
    assert [text for text, _ in found] == [row["text"] for row in rows] * 3
    assert [found[place][1] for place in (3, 20)] == ["a.parquet, row 3", "json, row 0"]


def test_bad_row_of_a_stream_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "x"}, {"text": None}))
    hub = {"path": "json", "data_files": str(tmp_path / "a.jsonl")}
    with pytest.raises(UserError, match=r"^json: row 1: `text` is null, not text\. Leave it out\.$"):
        list(iterate_documents([hub], None, "text", "x", streaming=True))
    with pytest.raises(UserError, match=r"Cannot load data set json: .*none"):
        list(iterate_documents([{**hub, "data_files": "none.jsonl"}], None, "text", "x", streaming=True))
    with pytest.raises(UserError, match="no column `body`, only text"):
        list(iterate_documents([hub], None, "body", "x", streaming=True))


def test_bad_row_of_a_table_is_named_also_where_it_is_read_into_memory(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", None]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"^a\.parquet: row 1: `text` is null, not text\. Leave it out\.$"):
        read_texts("a.parquet", str(tmp_path), "text", "x")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_called_conversation_is_a_column_like_any_other(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "one", "conversation": "a title"}, {"text": "two", "conversation": "another"}]
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    else:
        Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    (source,) = load_documents([f"a.{kind}"], str(tmp_path), "text")
    assert not source.is_chat and source.documents[source.text_field] == ["one", "two"]
    assert read_conversations(f"a.{kind}", str(tmp_path), "x") == []
    assert chat_columns(["conversation", "messages"]) == ["messages"]


def test_column_missing_from_a_table_is_named(tmp_path: Path) -> None:
    Dataset.from_dict({"id": [1], "body": ["one"]}).to_parquet(str(tmp_path / "a.parquet"))
    for entry in ("a.parquet", {"path": "parquet", "data_files": str(tmp_path / "a.parquet")}):
        with pytest.raises(UserError, match=r"no column `text`, only id, body\. Set `text_field`"):
            load_documents([entry], str(tmp_path), "text")


def test_data_set_of_several_splits_or_a_stream_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for extra in ({"split": None}, {"streaming": True}):
        with pytest.raises(UserError, match="give one `split`, without `streaming`"):
            load_documents([{"path": "text", "data_files": str(tmp_path / "a.txt"), **extra}], None, "text")


def test_missing_file_without_a_root_names_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"current folder, .* \(`data.root` is not set\)"):
        check_sources(DataConfig(train=("a.txt",)))
