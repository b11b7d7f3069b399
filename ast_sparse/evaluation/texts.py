"""The texts that are measured: WikiText-2, C4, files, and the groups of documents of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ast_sparse.data.sources.documents import load_documents, read_conversations, read_groups, read_texts
from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import wikitext2_rows

WIKITEXT2, C4 = "wikitext2", "c4"
_C4_DOCUMENTS, _C4_WINDOWS = 1100, 256
_C4_ENTRY = {
    "path": "allenai/c4",
    "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    "split": f"validation[:{_C4_DOCUMENTS}]",
}


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text to measure.

    Attributes:
        name: what tables call it.
        documents: to be joined by `join`; for chat data, rows with its columns.
        windows: how many to measure, from the first on; None: all.
        group: the file, if this text is a group of its documents.
    """

    name: str
    documents: list[Any]
    join: str
    is_chat: bool = False
    windows: int | None = None
    group: str | None = None


def read_datasets(
    names: Sequence[str],
    *,
    split: str = "test",
    data_dir: str | None = None,
    text_field: str = "text",
    by: str | None = None,
    join: str | None = None,
) -> list[Text]:
    """Read the texts that `--dataset` names.

    C4 is as in the pruning literature: the first 1100 documents of the first validation file, joined by a space, the
    first 256 windows.

    Args:
        names: `wikitext2`, `c4`, or files: text, JSONL or parquet, including chat data.
        split, data_dir: as in `wikitext2_rows`.
        by: group the documents of every file by this field; a text for every value.
        join: as in `windows.tokenise`; None: a space for C4, otherwise a blank line.

    Raises:
        UserError: a text is missing or cannot be read, or `by` is given with a text that has no fields.
    """
    texts: list[Text] = []
    names = list(dict.fromkeys(names))
    files = Counter(Path(name).name for name in names)
    for name in names:
        label = Path(name).name if files[Path(name).name] == 1 else name
        if by is not None:
            texts += _groups(_file(name, by), label, text_field, by, join or "blank-line")
        elif name == WIKITEXT2:
            texts.append(_wikitext2(split, data_dir, join or "blank-line"))
        elif name == C4:
            documents = _c4_documents()
            texts.append(Text(name=f"{C4} validation", documents=documents, join=join or "space", windows=_C4_WINDOWS))
        elif rows := read_conversations(str(_file(name).absolute()), None, "--dataset"):
            if join not in (None, "separate"):
                raise UserError(
                    f"--join {join} joins text, but {name} is chat data, whose rows stay separate. Remove it."
                )
            texts.append(Text(name=label, documents=rows, join="separate", is_chat=True))
        else:
            documents = read_texts(str(_file(name).absolute()), None, text_field, "--dataset")
            texts.append(Text(name=label, documents=documents, join=join or "blank-line"))
    return texts


def _file(name: str, by: str | None = None) -> Path:
    if by is not None and name in (WIKITEXT2, C4):
        raise UserError(f"--by {by} groups the documents of a file, not {name}. Name a JSONL or parquet file.")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"--dataset {name}: no such file, and not {WIKITEXT2} or {C4}. Correct the name.")
    return path


def _groups(file: Path, label: str, text_field: str, by: str, join: str) -> list[Text]:
    try:
        groups = read_groups(str(file.absolute()), None, text_field, by, "--dataset")
    except UserError as error:
        raise UserError(f"--by {by}: {error}") from None
    return [
        Text(name=f"{label} {value}", documents=documents, join=join, group=label)
        for value, documents in groups.items()
    ]


def _wikitext2(split: str, data_dir: str | None, join: str) -> Text:
    source = Path(data_dir).expanduser() if data_dir is not None else None
    name = source.name if source is not None and source.is_file() else f"{WIKITEXT2} {split}"
    return Text(name=name, documents=wikitext2_rows(split, source), join=join)


def _c4_documents() -> list[str]:
    try:
        source = load_documents([_C4_ENTRY], None, "text", "--dataset")[0]
    except UserError as error:
        raise UserError(
            f"--dataset {C4} is read from the hub. {error} Without a network, give a file of C4 as --dataset FILE."
        ) from None
    return list(source.documents["text"])
