"""Rows and steps without a counted token: rows are left out, steps change nothing."""

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import TrainerCallback

from ast_sparse import SparseTrainer, SparsityConfig, UserError, WatchConfig
from ast_sparse.config import load_config
from ast_sparse.run.train import run_training
from ast_sparse.sparsity.model import sparse_layers
from tests.data.chats import conversation, tokenizer
from tests.models import generated_text, tiny_model
from tests.training.small_runs import Rows, arguments, weights


class States(TrainerCallback):
    """Weights, masks and optimizer state at the end of every step."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        masks = {name: layer.mask.clone() for name, layer in sparse_layers(model).items()}
        self.states.append((weights(model), masks, copy.deepcopy(kwargs["optimizer"].optimizer.state_dict()["state"])))


def run_of(folder: Path, is_empty: list[bool], accumulation: int = 1, **kwargs: Any) -> tuple[SparseTrainer, States]:
    """One row per micro-batch, with one or several of them in a step."""
    settings: dict[str, Any] = dict(
        max_steps=len(is_empty) // accumulation, per_device_train_batch_size=1, weight_decay=0.1,
        gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential",
    )  # fmt: skip
    run = SparseTrainer(
        tiny_model(),
        arguments(folder, **{**settings, **kwargs.pop("args", {})}),
        sparsity_config=kwargs.pop("sparsity", SparsityConfig(mask_interval=1, mask_decay=1e-2)),
        train_dataset=Rows(is_empty),
        **kwargs,
    )
    states = States()
    run.add_callback(states)
    return run, states


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    return all(same(a, b) for a, b in zip(one, two, strict=True)) if isinstance(one, tuple | list) else one == two


def test_a_step_without_a_counted_token_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, states = run_of(tmp_path, [False, True, False, True, True, False])
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    run.train()
    assert [same(*states.states[step : step + 2]) for step in range(5)] == [True, False, True, True, False]
    log = run.state.log_history
    by_step = {row["step"]: row for row in log if "learning_rate" in row}
    assert [step for step, row in by_step.items() if "loss" in row and "grad_norm" in row] == [1, 3, 6]
    assert [row.get("empty_steps") for row in by_step.values()] == [None, 1, 1, 2, 3, 3]
    assert len({row["learning_rate"] for row in by_step.values()}) == 6  # it moves on
    assert [row["step"] for row in log if "flip_rate" in row] == [1, 3, 6]
    mean = sum(row["loss"] for row in by_step.values() if "loss" in row) / 3
    assert log[-1]["train_loss"] == pytest.approx(mean, rel=1e-6)
    said = [record for record in caplog.records if "has no token that the loss counts" in record.getMessage()]
    assert len(said) == 1 and "Step 2 " in said[0].getMessage()


def test_a_step_is_judged_over_all_its_micro_batches_and_the_mean_is_over_steps_with_a_loss(tmp_path: Path) -> None:
    is_empty = [False, True, True, True, True, False, False, False]
    run, states = run_of(tmp_path, is_empty, 2, args={"logging_steps": 2})
    output = run.train()
    assert [same(*states.states[step : step + 2]) for step in range(3)] == [True, False, False]
    single, _ = run_of(tmp_path / "single", is_empty, 2)
    single.train()
    losses = {row["step"]: row["loss"] for row in single.state.log_history if "loss" in row}
    assert sorted(losses) == [1, 3, 4]
    found = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert found == pytest.approx([losses[1], (losses[3] + losses[4]) / 2], rel=1e-6)
    assert output.training_loss == pytest.approx(sum(losses.values()) / 3, rel=1e-6)


def test_a_refresh_that_is_due_waits_for_the_next_step_with_an_update(tmp_path: Path) -> None:
    for criterion in ("magnitude", "wanda"):
        sparsity = SparsityConfig(mask_interval=3, mask_decay=1e-2, criterion=criterion)
        run, _ = run_of(tmp_path / criterion, [False, False, True, True, False, False, False], sparsity=sparsity)
        run.train()
        assert [row["step"] for row in run.state.log_history if "flip_rate" in row] == [5, 6]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_resumed_run_continues_like_an_uninterrupted_one(tmp_path: Path, at: int) -> None:
    is_empty = [False, False, True, True, False, False, False]
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    sparsity = SparsityConfig(mask_interval=3, mask_decay=1e-2)
    whole, _ = run_of(tmp_path, is_empty, sparsity=sparsity, args=settings)
    whole.train()
    resumed, _ = run_of(tmp_path, is_empty, sparsity=sparsity, args=settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert same(weights(resumed.model), weights(whole.model))
    keys = ("step", "loss", "empty_steps", "flip_rate")
    logs = [
        [{key: row[key] for key in keys if key in row} for row in run.state.log_history[:-1]]
        for run in (whole, resumed)
    ]
    assert [row for row in logs[0] if "flip_rate" in row] == [row for row in logs[1] if "flip_rate" in row]
    assert [row for row in logs[0] if row.get("empty_steps")] == [row for row in logs[1] if row.get("empty_steps")]


def test_a_loss_of_no_token_does_not_count_as_usual(tmp_path: Path) -> None:
    """Zeros in the median would make every later loss a jump."""
    watch = WatchConfig(spike="stop", spike_window=4, spike_factor=1.5)
    run, _ = run_of(tmp_path, [False] + [True] * 6 + [False] * 6, watch_config=watch)
    run.train()
    assert run.state.global_step == 13


def test_a_run_of_only_empty_steps_logs_no_loss(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path, [True, True])
    before = weights(run.model)
    output = run.train()
    assert math.isnan(output.training_loss) and not any(
        {"loss", "train_loss"} & set(row) for row in run.state.log_history
    )
    embedding = "model.embed_tokens.weight"
    assert torch.equal(run.model.state_dict()[embedding], before[embedding])


def labelled(is_empty: list[bool]) -> Dataset:
    rows = Rows(is_empty)
    return Dataset.from_list([rows[index] for index in range(len(rows))])


def test_rows_without_a_counted_token_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = labelled([True, False, True, True, False])
    run = SparseTrainer(tiny_model(), arguments(tmp_path), train_dataset=rows, eval_dataset={"a": rows})
    assert list(run.train_dataset) == [rows[1], rows[4]] and list(run.eval_dataset["a"]) == [rows[1], rows[4]]
    assert "train_dataset: 3 of 5 blocks have no token that the loss counts and are left out." in caplog.text
    listed = SparseTrainer(tiny_model(), arguments(tmp_path), train_dataset=list(rows))
    assert listed.train_dataset == [rows[1], rows[4]]
    whole = labelled([False, False])
    assert SparseTrainer(tiny_model(), arguments(tmp_path), train_dataset=whole).train_dataset is whole


@pytest.mark.parametrize("kind", [lambda rows: rows, list, lambda rows: {"a": rows, "b": labelled([False])}])
def test_rows_that_are_all_empty_are_refused(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(UserError, match=r"train_dataset.*: none of 2 blocks has a token that the loss counts"):
        SparseTrainer(tiny_model(), arguments(tmp_path), train_dataset=kind(labelled([True, True])))


def test_an_evaluation_without_a_counted_token_has_no_loss(tmp_path: Path) -> None:
    run = SparseTrainer(tiny_model(), arguments(tmp_path), train_dataset=labelled([False]))
    with pytest.raises(UserError, match=r"There is no eval_loss: no token of the data to evaluate on is counted"):
        run.evaluate(labelled([True, True]))
    assert "test_loss" not in run.predict(labelled([True])).metrics


LONG = generated_text(12)


def chat(folder: Path, answers: list[str], columns: str = "messages") -> None:
    """Rows with a long prompt and a short answer."""
    rows: list[dict[str, Any]] = []
    for index, answer in enumerate(answers):
        prompt = f"{index} {LONG}"
        if columns == "messages":
            rows.append({"messages": conversation(prompt, answer)})
        else:
            rows.append({"prompt": prompt, "completion": answer})
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained(folder: Path, **data: Any) -> tuple[list[str], Path]:
    tiny_model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    tree = {
        "model": {"name_or_path": str(folder / "model")},
        "data": {"root": str(folder), "train": ["chat.jsonl"], "block_size": 32, **data},
        "sparsity": {"mask_interval": 1},
        "evaluation": {"windows": 1} if data["eval_share"] else {"datasets": []},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 1, "logging_steps": 1, "use_cpu": True,
                     "disable_tqdm": True, "save_strategy": "no"},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    lines: list[str] = []
    run_training(load_config(folder / "run.yaml"), str(folder / "run"), echo=lines.append)
    return "\n".join(lines).split("\n"), folder / "run"


@pytest.mark.parametrize(
    ("columns", "packing"), [("messages", "joined"), ("prompt", "joined"), ("messages", "documents")]
)
def test_ast_train_leaves_empty_blocks_out_and_reports_counted_tokens(
    tmp_path: Path, columns: str, packing: str
) -> None:
    chat(tmp_path, ["moves"] * 30, columns)
    lines, run = trained(tmp_path, eval_share=0.2, packing=packing)
    for split in ("train", "held out"):
        (at,) = [index for index, line in enumerate(lines) if line.startswith(f"{split}: ")]
        blocks = int(lines[at].split(" -> ")[1].split(" blocks")[0])
        words = lines[at + 1].split()
        counted, left_out = int(words[4]), int(words[6])
        assert lines[at + 1].startswith("  counted in the loss: ") and 0 < counted < 200 and left_out > blocks / 2
        if split == "train":
            log = json.loads((run / "trainer_state.json").read_text())
            assert log["max_steps"] == blocks - left_out
            assert all("loss" in row for row in log["log_history"] if "learning_rate" in row)
    assert json.loads((run / "results.json").read_text())["dense"]["heldout"]["predicted_tokens"] > 0


@pytest.mark.parametrize("is_domain", [False, True])
def test_text_whose_blocks_are_all_empty_is_refused(tmp_path: Path, is_domain: bool) -> None:
    chat(tmp_path, ["moves"])
    data: dict[str, Any] = {"eval_share": 0, "block_size": 100}
    if is_domain:
        data |= {"train": None, "domains": {"chat": {"train": "chat.jsonl"}}}
    with pytest.raises(UserError, match=r"The text of chat.jsonl \(train\): none of \d+ blocks? has a token") as error:
        trained(tmp_path, **data)
    assert str(error.value).startswith("data.domains.chat: ") == is_domain
    assert not (tmp_path / "run").exists()
