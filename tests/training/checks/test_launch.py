"""The arguments of a run on several processes: what they say, and what is said if they cannot connect."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from ast_sparse.distributed.meeting import is_first_of_launch_to
from ast_sparse.errors import UserError
from ast_sparse.training.checks import arguments as arguments_module
from ast_sparse.training.checks.arguments import build_arguments


def test_processes_that_do_not_find_each_other_are_not_blamed_on_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unconnected(TrainingArguments):
        def __post_init__(self) -> None:
            raise torch.distributed.DistNetworkError("refused")

    monkeypatch.setattr(arguments_module, "TrainingArguments", Unconnected)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    expected = (
        "The processes cannot connect with each other: refused. Check .* reach MASTER_ADDR:MASTER_PORT=gpu1:29500."
    )
    with pytest.raises(UserError, match=expected):
        build_arguments({"use_cpu": True}, str(tmp_path))


@pytest.mark.parametrize(
    ("shared", "restarts", "refused"), [("True", "1", True), ("True", "0", False), ("False", "1", False)]
)
def test_a_restart_that_would_get_the_old_addresses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str, restarts: str, refused: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") if refused else nullcontext():
        build_arguments({"use_cpu": True, "report_to": "none"}, str(tmp_path))
    if refused:  # the process that says so does not ask the others
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"}.items():
            monkeypatch.setenv(name, value)
        assert is_first_of_launch_to("say an error") is None


def test_only_one_process_of_all_nodes_speaks_unless_another_is_wanted(tmp_path: Path) -> None:
    settings = {"use_cpu": True, "report_to": "none"}
    assert build_arguments(settings, str(tmp_path)).log_on_each_node is False
    assert build_arguments({**settings, "log_on_each_node": True}, str(tmp_path)).log_on_each_node is True


@pytest.mark.parametrize(
    ("name", "value", "setting", "message"),
    [
        ("MIXED_PRECISION", "bf16", {"bf16": True}, "mixed_precision=bf16, but .* Set training.bf16: true"),
        ("MIXED_PRECISION", "fp16", {"bf16": True}, "mixed_precision=fp16, but .* Set training.fp16: true"),
        ("MIXED_PRECISION", "fp8", {"bf16": True}, "mixed_precision=fp8, but .* off. Set mixed_precision: 'no'"),
        ("DYNAMO_BACKEND", "INDUCTOR", {"torch_compile": True}, "dynamo_backend=INDUCTOR.*torch_compile is off"),
    ],
)
def test_what_accelerate_turns_on_without_the_settings_of_the_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, setting: dict[str, bool], message: str
) -> None:
    settings = {"use_cpu": True, "report_to": "none"}
    monkeypatch.setenv(f"ACCELERATE_{name}", "no")
    build_arguments(settings, str(tmp_path))
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    build_arguments({**settings, **setting}, str(tmp_path))
    with pytest.raises(UserError, match=message):
        build_arguments(settings, str(tmp_path))
    if name == "MIXED_PRECISION":
        build_arguments(settings, str(tmp_path), is_decided=False)  # with `bf16: auto`, compared later
