"""What a signal does to a run, at every moment of it."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transformers import TrainerCallback

from ast_sparse import SparseTrainer
from ast_sparse.cli.train import main
from ast_sparse.run import output as output_module
from ast_sparse.run import signals as signals_module
from ast_sparse.run import train as run_module
from ast_sparse.run.preemption import PreemptionCallback
from ast_sparse.run.signals import Preempted, PreemptionSignals, preemption_signals
from ast_sparse.training.resume.checkpoints import faults
from tests.models import generated_text, save_tiny_model
from tests.training.small_runs import blocks, trainer

CONFIG = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/text.txt, eval_share: 0.1, block_size: 16}}
sparsity: {{mask_interval: 2}}
training: {{max_steps: 3, save_steps: 1, eval_strategy: steps, eval_steps: 2, use_cpu: true, report_to: none}}
evaluation: {{windows: 2}}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(generated_text(100))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture
def interrupted(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Runs the command, which gets a signal whenever a function of it is called."""

    def run(owner: Any, name: str, number: signal.Signals, *options: str) -> Result:
        function = getattr(owner, name)

        def signalled(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, signalled)
            command = ["--config", f"{inputs}/run.yaml", "--output-dir", f"{tmp_path}/out", *options]
            return CliRunner().invoke(main, command)

    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("owner", "name", "number", "restart"),
    [
        (run_module, "build_datasets", signal.SIGUSR1, "start it again with the same command"),
        (run_module, "load_student", signal.SIGTERM, "start it again with the same command"),
        (output_module, "_write_config", signal.SIGTERM, "--resume starts it again"),
        (SparseTrainer, "get_train_dataloader", signal.SIGTERM, "--resume starts it again"),
    ],
    ids=["tokenising", "loading", "writing", "evaluated"],
)
def test_before_training_a_signal_leaves_at_once(
    interrupted: Callable[..., Result], tmp_path: Path, owner: Any, name: str, number: signal.Signals, restart: str
) -> None:
    result = interrupted(owner, name, number)
    assert result.exit_code == 75, result.output
    line = f"{number.name}: stopped before training began, nothing was saved; {restart}."
    assert result.stderr.splitlines()[-1] == line
    left = {path.name for path in (tmp_path / "out").glob("*")}
    if "same command" in restart:
        assert not left  # so the same command is not refused
    else:
        assert "config.yaml" in left and not any("checkpoint" in name for name in left)


def test_a_run_that_left_before_training_is_resumed_from_the_beginning(
    interrupted: Callable[..., Result], inputs: Path, tmp_path: Path
) -> None:
    assert interrupted(output_module, "_write_config", signal.SIGTERM).exit_code == 75
    options = ["--config", f"{inputs}/run.yaml", "--output-dir", f"{tmp_path}/out", "--resume"]
    assert CliRunner().invoke(main, options).exit_code == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_one_command_starts_a_run_resumes_it_and_leaves_it_alone_once_it_is_finished(
    interrupted: Callable[..., Result], inputs: Path, tmp_path: Path
) -> None:
    out, flag = tmp_path / "out", "--resume-if-started"
    command = ["--config", f"{inputs}/run.yaml", "--set", f"training.output_dir={out}", flag]
    measures_nothing = ["--set", "evaluation.datasets=[]"]  # the end is seen without results, too
    assert interrupted(output_module, "_write_config", signal.SIGTERM, flag, *measures_nothing).exit_code == 75
    assert interrupted(SparseTrainer, "evaluate", signal.SIGTERM, flag, *measures_nothing).exit_code == 75
    assert (out / "checkpoint-2").exists() and not (out / "model.safetensors").exists()
    assert CliRunner().invoke(main, [*command, *measures_nothing]).exit_code == 0
    assert [json.loads(line)["step"] for line in (out / "mask_history.jsonl").read_text().splitlines()] == [2]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = CliRunner().invoke(main, command)
    said = f"{out} has the finished run: nothing is left to do. --overwrite would start it again.\n"
    assert (again.exit_code, again.stdout) == (0, said)
    other = CliRunner().invoke(main, [*command, "--set", "training.max_steps=4"])
    assert other.exit_code == 2 and "training.max_steps=4 differs from 3" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_signal_during_the_final_save_lets_it_finish(
    interrupted: Callable[..., Result], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = interrupted(run_module, "check_final", signal.SIGTERM)
    assert result.exit_code == 0, result.output
    assert "SIGTERM: what is being written will be finished; a second signal stops at once." in capfd.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert any(stage.startswith("retrained") for stage in results)


def test_a_signal_during_an_evaluation_saves_after_it_without_a_further_step(
    interrupted: Callable[..., Result], tmp_path: Path
) -> None:
    result = interrupted(SparseTrainer, "evaluate", signal.SIGTERM)
    assert result.exit_code == 75, result.output
    saved = tmp_path / "out" / "checkpoint-2"
    assert result.stderr.splitlines()[-1] == f"SIGTERM: saved {saved}; --resume continues from there."
    assert any("eval_loss" in entry for entry in json.loads((saved / "trainer_state.json").read_text())["log_history"])


class SignalAt(TrainerCallback):
    """Sets the signal as its handler does, during a step."""

    def __init__(self, signals: PreemptionSignals, step: int) -> None:
        self.signals, self.step = signals, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.signals.received = signal.SIGTERM


@pytest.mark.parametrize(
    "args",
    [
        dict(save_only_model=True, save_strategy="steps"),
        dict(
            save_strategy="best", eval_strategy="steps", eval_steps=1, metric_for_best_model="loss",
            greater_is_better=True,
        ),
    ],
    ids=["save_only_model", "best"],
)  # fmt: skip
def test_the_checkpoint_is_complete_whatever_the_save_strategy(tmp_path: Path, args: dict[str, Any]) -> None:
    signals = PreemptionSignals()
    run = trainer(tmp_path, args=args, eval_dataset=blocks(count=4, seed=7))
    run.add_callback(SignalAt(signals, step=3))
    run.add_callback(PreemptionCallback(signals))
    with pytest.raises(Preempted, match=r"^SIGTERM: saved .*checkpoint-3; --resume"):
        run.train()
    assert faults(tmp_path / "checkpoint-3") == []


def test_without_a_signal_nothing_is_saved_that_was_not_asked_for(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.add_callback(PreemptionCallback(PreemptionSignals()))
    run.train()
    assert run.state.global_step == 6 and not list(tmp_path.glob("checkpoint-*"))


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    head = "import os, signal, time\nfrom ast_sparse.run import signals\n"
    return subprocess.run([sys.executable, "-c", head + program], capture_output=True, text=True)


@pytest.mark.parametrize(("apart", "code"), [(0.9, 0), (1.1, 128 + signal.SIGTERM)], ids=["passed on", "second"])
def test_a_second_signal_stops_at_once_unless_a_launcher_passed_the_first_one_on(apart: float, code: int) -> None:
    done = run_python(
        "now = 5.0\n"
        "signals.time.monotonic = lambda: now\n"
        "with signals.preemption_signals() as caught:\n"
        "    caught.begin_training()\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        f"    now += {apart}\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert caught.received is signal.SIGUSR1\n"
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.count("SIGUSR1: the step and its checkpoint will be finished") == 1


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("3", 0)])
def test_only_the_first_rank_says_that_it_will_stop(monkeypatch: pytest.MonkeyPatch, rank: str, lines: int) -> None:
    written: list[bytes] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(signals_module.os, "write", lambda _, text: written.append(text))
    with preemption_signals() as caught:
        caught.begin_training()
        os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.received is signal.SIGUSR1 and len(written) == lines


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, 0)])
def test_a_worker_process_ends_by_sigterm_and_leaves_sigusr1_to_the_run(number: signal.Signals, status: int) -> None:
    with preemption_signals() as caught:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == status
        assert caught.received is None


def test_a_signal_inside_a_held_block_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(signals_module.os, "write", lambda *args: None)
    with preemption_signals() as caught, pytest.raises(Preempted, match="nothing was saved"), caught.held():
        os.kill(os.getpid(), signal.SIGTERM)
        written.append("all")
    assert written == ["all"]


def test_a_signal_where_python_ignores_exceptions_still_stops_the_run() -> None:
    class Leaving:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            reached.append("handled here")

    reached: list[str] = []
    with preemption_signals() as caught, pytest.raises(Preempted, match="SIGUSR1: stopped before training"):
        Leaving()
        reached.append("goes on")
        threading.Event().wait(20)
    assert reached == ["goes on"] and caught.received is signal.SIGUSR1


def test_handlers_are_those_from_before_when_the_block_ends() -> None:
    before = [signal.getsignal(number) for number in signals_module.SIGNALS]
    with preemption_signals():
        assert [signal.getsignal(number) for number in signals_module.SIGNALS] != before
    assert [signal.getsignal(number) for number in signals_module.SIGNALS] == before
