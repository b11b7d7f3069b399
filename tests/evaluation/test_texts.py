"""Which texts are measured, and how they are named."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_sparse.errors import UserError
from ast_sparse.evaluation import texts as module
from ast_sparse.evaluation.texts import Text, read_datasets

ROWS: list[dict[str, Any]] = [
    {"text": "one", "domain": "books", "meta": {"set": 1}},
    {"text": "two", "domain": "wiki", "meta": {"set": 2}},
    {"text": "three", "domain": "books", "meta": {"set": 1}},
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "plain.txt").write_text("plain")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize(("by", "values"), [("domain", ("books", "wiki")), ("meta.set", ("1", "2"))])
def test_documents_are_grouped_by_a_field(files: Path, name: str, by: str, values: tuple[str, str]) -> None:
    expected = [
        Text(name=f"{name} {value}", documents=documents, join="blank-line", group=name)
        for value, documents in zip(values, (["one", "three"], ["two"]), strict=True)
    ]
    assert read_datasets([str(files / name)], by=by) == expected


def test_fields_that_cannot_group_are_named(files: Path) -> None:
    (files / "b.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"text": "x", "domain": None}))
    cases = [
        ("a.jsonl", "nothing", "--by nothing: .*a.jsonl, line 1: no field `nothing` to group by"),
        ("a.jsonl", "meta", r"a.jsonl, line 1: `meta` is \{.*\}, not a string or number"),
        ("a.jsonl", "meta.other", "line 1: no field `meta.other`"),
        ("b.jsonl", "domain", "b.jsonl, line 2: `domain` is null"),
        ("a.parquet", "nothing", "a.parquet has no column `nothing`, only text, domain, meta. Name one of them"),
        ("plain.txt", "domain", "plain.txt is plain text, which has no fields"),
    ]
    for name, by, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            read_datasets([str(files / name)], by=by)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--by domain groups the documents of a file, not wikitext2"):
        read_datasets(["wikitext2"], by="domain")


def test_files_of_the_same_name_have_different_labels(files: Path) -> None:
    (files / "other").mkdir()
    (files / "other" / "plain.txt").write_text("other")
    names = [str(files / "plain.txt"), str(files / "other" / "plain.txt"), str(files / "a.jsonl")]
    assert [text.name for text in read_datasets([*names, names[0]])] == [*names[:2], "a.jsonl"]


def test_c4_is_the_published_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(entries: list[Any], *_: Any, **__: Any) -> list[Any]:
        asked.extend(entries)
        return [SimpleNamespace(documents={"text": ["a", "b"]})]

    monkeypatch.setattr(module, "load_documents", load)
    assert read_datasets(["c4"]) == [Text(name="c4 validation", documents=["a", "b"], join="space", windows=256)]
    assert read_datasets(["c4"], join="separate")[0].join == "separate"
    assert asked[0] == {
        "path": "allenai/c4",
        "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        "split": "validation[:1100]",
    }


def test_c4_without_network_is_one_line() -> None:
    with pytest.raises(UserError, match=r"--dataset c4 is read from the hub. .* give a file of C4") as caught:
        read_datasets(["c4"])
    assert "\n" not in str(caught.value)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="--dataset wikitext: no such file, and not wikitext2 or c4"):
        read_datasets(["wikitext"])
