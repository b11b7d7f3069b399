"""Progress: occasional lines without carriage returns in a log, bars on a terminal."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tqdm.auto
from click.testing import CliRunner
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.utils import logging

from ast_sparse.cli.data import main as ast_data
from ast_sparse.progress import LineBar, library_bars, lines_for_bars, progress_bar
from ast_sparse.training.callbacks.lines import ProgressLines
from tests.models import generated_text, save_tiny_model
from tests.processes import Started
from tests.training.small_runs import blocks, trainer

Log = pytest.CaptureFixture[str]


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of every bar, in seconds."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


@pytest.fixture
def log(capsys: Log) -> Log:
    """stderr, which is a file."""
    return capsys


def lines(log: Log) -> list[str]:
    text = log.readouterr().err
    assert "\r" not in text
    return text.splitlines()


def test_a_log_gets_a_line_each_half_minute_and_one_at_the_end(now: list[float], log: Log) -> None:
    for _ in progress_bar(range(200), "Encoding", unit="tensor"):
        now[0] += 0.5
    assert lines(log) == [
        "Encoding: 30% (60/200 tensors, 0:30 elapsed, 1:10 left)",
        "Encoding: 60% (120/200 tensors, 1:00 elapsed, 0:40 left)",
        "Encoding: 90% (180/200 tensors, 1:30 elapsed, 0:10 left)",
        "Encoding: 100% (200/200 tensors, 1:40 elapsed)",
    ]


def test_what_is_short_prints_nothing_or_one_line(now: list[float], log: Log) -> None:
    for seconds in (0.9, 5.0):
        with progress_bar(total=2, desc="Verifying", unit="layer") as bar:
            now[0] += seconds
            bar.update(2)
    progress_bar(total=2, disable=True).close()
    assert lines(log) == ["Verifying: 100% (2/2 layers, 0:05 elapsed)"]


def test_a_long_job_says_less_often_where_it_is(now: list[float], log: Log) -> None:
    with progress_bar(total=100 * 3600, desc="Training", unit="step") as bar:
        for _ in range(100 * 360):
            now[0] += 10
            bar.update(10)
    found = lines(log)
    assert 500 < len(found) < 900 and found[20] == "Training: 0% (640/360,000 steps, 10:40 elapsed, 99:49:20 left)"


def test_a_bar_without_an_end_counts(now: list[float], log: Log) -> None:
    with progress_bar(desc="Tokenising c4", unit=" tokens", unit_scale=True, delay=1) as bar:
        now[0] += 31
        bar.update(1_250_000)
        bar.set_postfix_str("ppl 3.00")
        now[0] += 4
    assert lines(log) == [
        "Tokenising c4: 1.25M tokens, 0:31 elapsed",
        "Tokenising c4: 1.25M tokens, 0:35 elapsed, ppl 3.00",
    ]


def test_what_was_done_before_a_resume_is_not_counted_as_fast(now: list[float], log: Log) -> None:
    with progress_bar(total=100, initial=50, desc="Training", unit="step") as bar:
        now[0] += 30
        bar.update(25)
    assert lines(log)[0] == "Training: 75% (75/100 steps, 0:30 elapsed, 0:30 left)"


def test_only_the_first_process_prints(now: list[float], log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress_bar(total=1) as bar:
        now[0] += 60
        bar.update()
    assert not lines(log)


def test_a_terminal_and_a_notebook_have_the_bars_of_tqdm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stderr", Stream(is_terminal=True))
    assert type(progress_bar(total=1)) is tqdm.auto.tqdm
    with lines_for_bars(), tqdm.auto.tqdm(total=1):
        pass
    assert "\r" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert callbacks(trainer(tmp_path, args={"disable_tqdm": False})) == [ProgressCallback]
    monkeypatch.setattr(sys, "stderr", Stream(is_terminal=False))
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", sys)
    assert type(progress_bar(total=1, disable=True)) is tqdm.auto.tqdm


def test_bars_of_libraries_print_lines_and_are_theirs_again_afterwards(now: list[float], log: Log) -> None:
    before = tqdm.auto.tqdm.display
    with lines_for_bars():
        for bar in (tqdm.auto.tqdm, logging.tqdm):
            for _ in bar(range(4), desc="Loading weights"):
                now[0] += 10
        Dataset.from_dict({"a": [1]}).map(lambda row: row, desc="Quick")
    assert lines(log) == [
        "Loading weights: 75% (3/4, 0:30 elapsed, 0:10 left)", "Loading weights: 100% (4/4, 0:40 elapsed)",
    ] * 2  # fmt: skip
    assert tqdm.auto.tqdm.display is before and not issubclass(tqdm.auto.tqdm, LineBar)


def test_bars_of_libraries_are_silent_where_that_is_asked_for(log: Log) -> None:
    with library_bars(False):
        Dataset.from_dict({"a": [1]}).map(lambda row: row, desc="Quick")
        list(logging.tqdm([1]))
    assert not lines(log)
    list(logging.tqdm([1]))
    assert log.readouterr().err


def callbacks(run: Any) -> list[type]:
    return [type(each) for each in run.callback_handler.callbacks if isinstance(each, ProgressCallback)]


def test_a_trainer_prints_lines_and_the_records_of_its_log(tmp_path: Path, now: list[float], capsys: Log) -> None:
    args = {"disable_tqdm": False, "eval_strategy": "steps", "eval_steps": 3}
    run = trainer(tmp_path, eval_dataset=blocks(4), args=args)
    assert callbacks(run) == [ProgressLines]
    step = run.training_step

    def slow(*args: Any, **kwargs: Any) -> Any:
        now[0] += 20
        return step(*args, **kwargs)

    run.training_step = slow  # type: ignore[method-assign]
    run.train()
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "Training: 33% (2/6 steps, 0:40 elapsed, 1:20 left)", "Training: 66% (4/6 steps, 1:20 elapsed, 0:40 left)",
        "Training: 100% (6/6 steps, 2:00 elapsed)",
    ]  # fmt: skip
    assert out.count("{'loss': ") == 6 and "\r" not in out
    run.remove_callback(ProgressCallback)
    assert not callbacks(run)
    assert callbacks(trainer(tmp_path)) == []  # disable_tqdm


def test_log_records_are_printed_by_one_process_unless_each_node_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "process_index", 4)  # the first process of the second node
    for on_each_node, printers in ((False, 0), (True, 1)):
        run = trainer(tmp_path, args={"log_on_each_node": on_each_node})
        assert run.is_local_process_zero() and not run.is_world_process_zero()
        assert [type(each) for each in run.callback_handler.callbacks].count(PrinterCallback) == printers


class Own(ProgressCallback):
    """A callback of the user's own."""


def test_a_callback_of_the_user_stays(tmp_path: Path, log: Log) -> None:
    assert callbacks(trainer(tmp_path, callbacks=[Own()])) == [Own]


def test_ast_train_into_a_file_leaves_few_lines(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    rows = [json.dumps({"text": generated_text(8, seed=seed)}) for seed in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    settings = {
        "model.name_or_path": tmp_path / "model", "data.train": f"[{tmp_path}/text.jsonl]", "data.block_size": 32,
        "training.max_steps": 8, "training.use_cpu": "true", "training.eval_strategy": "epoch",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text("sparsity: {mask_interval: 1}\n")
    command = [sys.executable, "-m", "ast_sparse.cli.train", "--config", str(tmp_path / "run.yaml")]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    log = tmp_path / "log"
    assert Started([*command, "--output-dir", str(tmp_path / "out")], output=(log, log)).wait() == 0
    text = log.read_bytes().decode()
    assert "\r" not in text and "Saved 2:4 model" in text and text.count("%|") == 0
    assert sum("elapsed" in line for line in text.splitlines()) < 10


def test_ast_data_into_a_file_draws_no_bar(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "a.txt").write_text(generated_text(9))
    made = CliRunner().invoke(
        ast_data,
        [
            "prepare",
            str(tmp_path / "s"),
            str(tmp_path / "a.txt"),
            "--workers",
            "1",
            "--tokenizer",
            str(tmp_path / "model"),
        ],
    )
    checked = CliRunner().invoke(ast_data, ["verify", str(tmp_path / "s")])
    assert made.exit_code == checked.exit_code == 0 and "\r" not in made.output + checked.output


def test_a_bar_that_an_exception_left_open_ends_before_the_message(now: list[float], log: Log) -> None:
    bars = []
    with pytest.raises(RuntimeError), lines_for_bars():
        for make in (progress_bar, tqdm.auto.tqdm):
            bars.append(make(total=4, desc="Training", unit="step"))
            now[0] += 5
        raise RuntimeError
    assert sorted(lines(log)) == ["Training: 0% (0/4 steps, 0:05 elapsed)", "Training: 0% (0/4 steps, 0:10 elapsed)"]
    del bars
    assert not lines(log)
