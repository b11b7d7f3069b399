"""Settings, text or an output folder that differ from those of the first process are refused before training."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from ast_sparse.config import RunConfig, load_config
from ast_sparse.config.yaml12 import dump_yaml
from ast_sparse.errors import LostProcessError, UserError
from ast_sparse.run import same_on_all
from ast_sparse.run.same_on_all import (
    check_same_evaluations,
    check_same_folder,
    check_same_models,
    check_same_settings,
    check_same_text,
)
from ast_sparse.training.resume.fingerprints import blocks_fingerprint
from tests.models import save_tiny_model


def config(folder: Path, **sections: Any) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(dump_yaml({"model": {"name_or_path": "m"}, "data": {"train": "a.txt"}, **sections}))
    return load_config(file)


def settings_on(monkeypatch: pytest.MonkeyPatch, first: RunConfig, second: RunConfig) -> None:
    """Check two processes, of which this one is the second."""
    given: list[Any] = []

    def gather(value: Any) -> list[Any]:
        given.append(value)
        return given

    monkeypatch.setattr(same_on_all, "gather", gather)
    check_same_settings(first)
    check_same_settings(second)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"training": {"learning_rate": 0.5}}, "^training.learning_rate=0.5 on process 1 differs from 0.25 on"),
        ({"training": {}}, "^training.learning_rate=null on process 1 differs from 0.25"),
        ({"distillation": {"alpha": 0.1}}, "^distillation.alpha=0.1 on process 1 differs from"),
        ({"slorb": {"k": 32}}, "^slorb.k=32 on process 1 differs from 16"),
        ({"data": {"train": "a.txt", "seed": 3}}, "^data.seed=3 on process 1 differs from"),
    ],
)
def test_a_process_with_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: dict[str, Any], message: str
) -> None:
    first: dict[str, Any] = {"training": {"learning_rate": 0.25}, "slorb": {"k": 16}}
    with pytest.raises(UserError, match=message):
        settings_on(monkeypatch, config(tmp_path, **first), config(tmp_path, **{**first, **second}))


def test_a_node_may_have_its_files_in_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domains = [{"one": {"train": f"{root}/one.txt"}, "two": {"train": f"{root}/two.txt"}} for root in "ab"]
    first, second = (
        config(tmp_path, model={"name_or_path": root}, data={"domains": parts, "root": root}, training=training)
        for root, parts, training in zip("ab", domains, ({}, {"dataloader_num_workers": 2}), strict=True)
    )
    settings_on(monkeypatch, first, second)


def test_a_default_that_is_written_out_and_a_file_in_another_place_are_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: list[dict[str, Any]] = [{}, {"seed": 42, "logging_steps": 500, "lr_scheduler_type": "linear"}]
    for name, training in zip("ab", settings, strict=True):
        training["fsdp_config"] = str(tmp_path / f"{name}.json")
        (tmp_path / f"{name}.json").write_text('{"reshard_after_forward": true}')
    configs = [config(tmp_path, training=each, evaluation={"datasets": [f"{each}.txt"]}) for each in settings]
    settings_on(monkeypatch, *configs)
    (tmp_path / "b.json").write_text('{"reshard_after_forward": false}')
    with pytest.raises(UserError, match=r"^training\.fsdp_config="):
        settings_on(monkeypatch, *configs)


@pytest.mark.parametrize(
    ("names", "texts", "is_same"),
    [
        (["heldout", "/b/x.txt"], {"/b/x.txt": ["one", "two"]}, True),
        (["heldout", "/b/x.txt"], {"/b/x.txt": ["one", "three"]}, False),
        (["/b/x.txt", "heldout"], {"/b/x.txt": ["one", "two"]}, False),
        (["heldout"], {}, False),
    ],
)
def test_a_process_that_measures_other_texts_is_refused(
    monkeypatch: pytest.MonkeyPatch, names: list[str], texts: dict[str, list[str]], is_same: bool
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(same_on_all, "gather", lambda value: given.append(value) or given)
    check_same_evaluations(["heldout", "x.txt"], {"x.txt": ["one", "two"]})
    refused = pytest.raises(UserError, match="datasets: the text on process 1 differs from that on process 0")
    with nullcontext() if is_same else refused:
        check_same_evaluations(names, texts)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"name_or_path": "copy", "teacher": "gpt2"}, None),
        ({"name_or_path": "other", "teacher": "gpt2"}, "name_or_path: the model on process 1 .* in its weight files"),
        ({"name_or_path": "gpt2", "teacher": "gpt2"}, "name_or_path: the model on process 1 .* in its configuration"),
        ({"name_or_path": "copy", "teacher": "other"}, "model.teacher: the model on process 1 .* in its configuration"),
        ({"name_or_path": "copy"}, "model.teacher is set on process 0 and not on process 1"),
    ],
)
def test_a_process_with_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: dict[str, str], message: str | None
) -> None:
    save_tiny_model(tmp_path / "ours")
    shutil.copytree(tmp_path / "ours", tmp_path / "copy")
    save_tiny_model(tmp_path / "other", seed=1)
    save_tiny_model(tmp_path / "gpt2", "gpt2")
    given: list[Any] = []

    def gather(value: Any) -> list[Any]:
        given.append(value)
        return [None, None] if value is None else [each for each in given if each is not None]

    monkeypatch.setattr(same_on_all, "gather", gather)
    for names in ({"name_or_path": "ours", "teacher": "gpt2"}, second):
        models = {key: str(tmp_path / name) for key, name in names.items()}
        refused = pytest.raises(UserError, match=message)
        with refused if message and names is second else nullcontext():
            check_same_models(config(tmp_path, model=models, distillation={}))


def test_a_process_with_other_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, others = (Dataset.from_dict({"input_ids": [[1, 2, last]]}) for last in (3, 4))
    check_same_text("data.train", ours)
    for first in (ours, others):
        monkeypatch.setattr(same_on_all, "gather", lambda value, first=first: [blocks_fingerprint(first), value])
        refused = pytest.raises(UserError, match="the text on process 1 differs from that on process 0")
        with refused if first is others else nullcontext():
            check_same_text("data.train", ours)


@pytest.mark.parametrize(("is_sharded", "sees"), [(True, True), (True, False), (False, False)])
def test_a_process_of_a_sharded_run_that_sees_another_output_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_sharded: bool, sees: bool
) -> None:
    check_same_folder(tmp_path, is_sharded)  # alone
    said: list[str] = []
    monkeypatch.setattr(same_on_all, "gather", lambda mine: [mine, sees if isinstance(mine, bool) else ".other"])
    monkeypatch.setattr(same_on_all.logger, "warning", said.append)
    refused = pytest.raises(UserError, match=r"Process 1 does not see the output folder .* parts of each checkpoint")
    with nullcontext() if sees or not is_sharded else refused:
        check_same_folder(tmp_path, is_sharded)
    assert tmp_path.exists() == (sees or not is_sharded)
    assert not list(tmp_path.glob("*"))
    assert len(said) == (not sees and not is_sharded)


def test_a_node_that_has_cached_that_the_folder_is_missing_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    @contextmanager
    def first_process_writes() -> Iterator[None]:
        if output.exists():  # here; on the server it does in any case
            (output / ".first").touch()
        yield

    monkeypatch.setattr(same_on_all, "rank", lambda: 1)
    monkeypatch.setattr(same_on_all, "errors_shared", first_process_writes)
    monkeypatch.setattr(same_on_all, "gather", lambda mine: [True if isinstance(mine, bool) else ".first", mine])
    check_same_folder(output, True)


def test_a_process_that_is_lost_leaves_no_mark_in_the_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(mine: Any) -> list[Any]:
        if isinstance(mine, bool):
            raise LostProcessError("gone")
        return [mine, ".other"]

    monkeypatch.setattr(same_on_all, "gather", gather)
    with pytest.raises(LostProcessError):
        check_same_folder(tmp_path, True)
    assert not list(tmp_path.iterdir())
