"""What ast-train refuses apart from its settings: files, folders, permissions and disk space."""

import errno
import io
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import TrainerCallback

from ast_sparse.cli.train import main
from ast_sparse.errors import SharedError
from ast_sparse.training.resume.checkpoints import faults
from ast_sparse.training.trainer import SparseTrainer
from tests.cli.refused_runs import CHECKPOINT_FILES, base, cut, refused, train
from tests.models import generated_text
from tests.processes import run_command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"run\.yaml' is empty"),
        ("- a\n", r"is a list, not a mapping"),
        ("model: {name_or_path: a}\n", r"section 'data' is missing"),
        ("model: {name_or_path: a\n", r"not valid YAML: line 2, column 1"),
        ("\tmodel: a\n", r"not valid YAML: line 1"),
        ("model: {}\nmodel: {}\n", r"line 2: key 'model' appears twice"),
        ("model: " + "[" * 3000, r"line 1: more than 32 levels deep"),
        ("model: {k: " + "9" * 5000 + "}", r"not valid YAML"),
        ("model: \0", r"not valid YAML"),
        ("---\na: 1\n---\nb: 1\n", r"not valid YAML"),
    ],
    ids=["empty", "list", "no data", "open brace", "tab", "twice", "deep", "long number", "zero byte", "two documents"],
)
def test_a_broken_file_is_named(root: Path, text: str, message: str) -> None:
    refused(root, message, text, "--output-dir", root / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "{root}/none.yaml"], r"none\.yaml' does not exist"),
        (["--config", "{root}"], r"is a folder\. Give the path of a YAML file"),
        (["--config", "{root}/bytes.yaml"], r"bytes\.yaml is not UTF-8"),
        ([], r"training\.output_dir is missing"),
        (["--output-dir", "{root}/text.txt"], r"text\.txt' is a file"),
        (["--output-dir", "{root}/text.txt/below"], r"text\.txt' cannot be written to"),
        (["--output-dir", "{root}/finished"], r"finished' already has a run.*--resume.*--overwrite"),
        (["--output-dir", "{root}"], r"already has files"),
        (["--output-dir", "{root}/llama", "--overwrite"], r"llama' is model\.name_or_path, and would be replaced"),
        (["--output-dir", "{root}/out", "--resume"], r"Nothing to resume: '.*out' has no complete checkpoint"),
        (["--output-dir", "{root}/out", "--resume", "/nowhere"], r"Checkpoint '/nowhere' is not a folder"),
        (
            ["--output-dir", "{root}/out", "--resume", "{root}/llama"],
            r"is not a complete training checkpoint: optimizer",
        ),
        (["--output-dir", "{root}/llama", "--resume", "{root}/finished/checkpoint-1"], r"llama' (holds|is)"),
        (["--output-dir", "{root}/out", "--resume", "--overwrite"], r"--resume and --overwrite cannot be combined"),
        (["--resume-if-started", "--overwrite"], r"--resume-if-started and --overwrite cannot be combined"),
        (["--output-dir", "{root}/out", "--resum"], r"No such option '--resum'"),
        *(
            (["--output-dir", "{root}/out", "--resume", f"{{root}}/damaged-{name}"], rf"{re.escape(name)}`? is damaged")
            for name in CHECKPOINT_FILES
        ),
        *(
            (["--output-dir", "{root}/finished", "--resume", "--set", change], message)
            for change, message in (
                ("sparsity.pattern=1:4", r"sparsity\.pattern='1:4' differs from '2:4' in .*checkpoint-2"),
                ("sparsity.mask_interval=3", r"sparsity\.mask_interval=3 differs from 2"),
                ("sparsity.exclude=down_proj", r"sparsity\.exclude=\['down_proj'\] differs from \[\]"),
                ("slorb=null", r"slorb\.enabled=False differs from True"),
                ("model.config_overrides.num_hidden_layers=1", r"is pruned in only one of this run"),
                ("model.config_overrides.intermediate_size=64", r"in the model and \(48, 32\) in .*checkpoint-2'"),
            )
        ),
    ],
    ids=lambda case: " ".join(case).replace("{root}/", "") if isinstance(case, list) else "",
)
def test_a_wrong_file_or_folder_is_named(root: Path, arguments: list[str], message: str) -> None:
    refused(root, message, base(root), *(argument.format(root=root) for argument in arguments))


def test_a_run_that_the_disk_has_no_room_for_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    refused(root, r"out' has 0\.0 GiB free, and the run needs about", base(root), "--output-dir", root / "out")


def test_missing_rights_are_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(generated_text(100))
    (tmp_path / "a.yaml").write_text("model: {}")
    (tmp_path / "locked").mkdir()
    allowed_open, allowed_access = io.open, os.access

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:  # as root, permissions would not refuse it
        if Path(str(file)).parent == tmp_path and Path(str(file)).stem == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return allowed_open(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed_access(path, mode))
    data = ["--set", f"data.train={tmp_path}/a.txt", "--output-dir", f"{root}/out"]
    refused(root, r"(?i)a\.txt cannot be read: .*permission denied", base(root), *data)
    refused(root, r"a\.yaml' cannot be read", base(root), "--config", tmp_path / "a.yaml")
    refused(root, r"locked' cannot be written to", base(root), "--output-dir", tmp_path / "locked/out")


def test_a_loss_that_is_not_finite_names_the_step_and_the_checkpoint(root: Path, tmp_path: Path) -> None:
    tree = base(root)
    tree["training"].update(learning_rate=1e30, max_steps=4)
    result = train(root, tree, "--output-dir", tmp_path / "out")
    assert result.exit_code == 2
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert re.search(r"^Error: Training diverged at step \d: .*(checkpoint-\d|no checkpoint yet)", last), last
    assert Path(re.findall(r"The batch: (\S+/replay/step-\d-rank-0\.safetensors)\.", last)[0]).exists()


@pytest.mark.parametrize("change", ["training.max_steps=0", "data.train=list.jsonl"])
def test_a_process_ends_with_2_and_one_line(root: Path, tmp_path: Path, change: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(base(root)))
    command = ["--config", config, "--set", change, "--output-dir", tmp_path / "out"]
    done = run_command([sys.executable, "-m", "ast_sparse.cli.train", *map(str, command)])
    assert done.returncode == 2
    assert re.fullmatch(r"Error: .*(max_steps=0|list\.jsonl, line 2).*\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_passed_over(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "finished", tmp_path / "run")
    cut(tmp_path / "run/checkpoint-2/optimizer.pt")
    result = train(root, base(root), "--output-dir", tmp_path / "run", "--resume")
    assert result.exit_code == 0, result.output
    whole, again = (load_file(folder / "model.safetensors") for folder in (root / "finished", tmp_path / "run"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "build_datasets",
            r"tokenised text cannot be cached: .*No space left.* HF_DATASETS_CACHE to a writable folder",
        ),
        ("SparseTrainer", r"training: .*No space left on device\. Correct training\.output_dir"),
    ],
)
def test_a_full_disk_before_training_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch, what: str, message: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"ast_sparse.run.train.{what}", full)
    refused(root, message, base(root), "--output-dir", root / "out")


@pytest.mark.parametrize(("rank", "said"), [("0", "Error: no room\n"), ("1", "")])
def test_an_error_that_all_processes_get_is_said_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, said: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SharedError("no room")

    monkeypatch.setattr("ast_sparse.run.train.run_training", full)
    monkeypatch.setattr("ast_sparse.cli.command._PRINT_S", 0)
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base(root)))
    result = CliRunner().invoke(main, ["--config", str(tmp_path / "run.yaml")])
    assert (result.exit_code, result.stderr) == (2, said)


def test_a_process_that_is_ended_while_another_says_the_error_says_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SharedError("no room")

    monkeypatch.setattr("ast_sparse.run.train.run_training", full)
    monkeypatch.setattr("time.sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base(root)))
    result = CliRunner().invoke(main, ["--config", str(tmp_path / "run.yaml")])
    assert (result.exit_code, result.stderr) == (2, "")


@pytest.mark.parametrize(
    ("limit", "reason", "what"),
    [
        (0, "File too large", "out"),
        (20_000, "File too large", "out/checkpoint-2"),
        (120_000, "a file could not be written whole", "out/checkpoint-2"),
    ],
    ids=["log", "weights", "optimizer"],
)
def test_a_run_without_space_ends_in_one_line_and_leaves_the_last_good_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, limit: int, reason: str, what: str
) -> None:
    """The file system refuses what is larger than the limit, from the second step on."""
    shutil.rmtree(root / "out", ignore_errors=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would leave cut files of the modules it imports

    class Full(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    build = SparseTrainer.__init__

    def build_full(self: SparseTrainer, *arguments: Any, **keywords: Any) -> None:
        build(self, *arguments, **keywords)
        self.add_callback(Full)

    monkeypatch.setattr(SparseTrainer, "__init__", build_full)
    try:
        result = train(root, base(root), "--output-dir", root / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = [line for line in re.split(r"[\r\n]+", result.stderr) if line.startswith("Error: ")]
    assert result.exit_code == 2 and len(last) == 1, result.output
    assert re.match(rf"Error: Cannot write `{root / what}`: .*({reason})", last[0]), last[0]
    assert last[0].endswith(f"Last good checkpoint: {root}/out/checkpoint-1. Make room, then use --resume."), last[0]
    assert [path.name for path in (root / "out").glob("*checkpoint*")] == ["checkpoint-1"]
    assert faults(root / "out" / "checkpoint-1") == []
    shutil.rmtree(root / "out")
