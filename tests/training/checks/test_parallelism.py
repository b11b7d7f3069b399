"""`training.parallelism_config`: read from YAML, refused where it does not fit, and free to change on a resume."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import ParallelismConfig
from transformers import TrainingArguments

from ast_sparse import UserError
from ast_sparse.config import load_config
from ast_sparse.training.checks.arguments import build_arguments
from ast_sparse.training.checks.parallelism import grid_of, hidden_from_accelerate
from ast_sparse.training.resume.setting_classes import kind_of, training_values

SIZES = {"dp_replicate_size": 2, "dp_shard_size": 4}
YAML = """
model: {name_or_path: model}
data: {train: text.txt}
training: {fsdp: true, use_cpu: true, parallelism_config: {dp_replicate_size: 2, dp_shard_size: 4}}
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """TrainingArguments with FSDP2 sets variables that stay."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_STATE_DICT_TYPE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def run(sizes: dict[str, Any] | None, processes: int) -> Any:
    config = None if sizes is None else ParallelismConfig(**sizes)
    return SimpleNamespace(parallelism_config=config, world_size=processes)


def test_sizes_in_yaml_reach_the_arguments_and_the_saved_settings(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(YAML)
    config = load_config(tmp_path / "run.yaml")
    args = build_arguments(config.training, str(tmp_path))
    assert isinstance(args.parallelism_config, ParallelismConfig)
    assert (args.parallelism_config.dp_replicate_size, args.parallelism_config.dp_shard_size) == (2, 4)
    assert config.to_dict()["training"]["parallelism_config"] == SIZES
    assert training_values(args)["parallelism_config"] == SIZES


def test_the_grid_is_replicas_by_shards_and_one_replica_by_default() -> None:
    assert grid_of(run(SIZES, 8)) == (2, 4)
    assert grid_of(run({"dp_shard_size": 8}, 8)) == (1, 8)
    assert grid_of(run(None, 8)) == (1, 8)


def test_accelerate_launch_asks_for_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "4")
    args = run(None, 8)
    assert grid_of(args) == (2, 4)
    with hidden_from_accelerate(args):
        assert "ACCELERATE_USE_PARALLELISM_CONFIG" not in os.environ
    assert grid_of(args) == (2, 4)
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(UserError, match=r"^parallelism_config of `accelerate launch`: tp_size=2: tensor, context"):
        grid_of(run(None, 8))


def test_a_number_of_processes_that_does_not_fit_is_refused_with_one_that_does() -> None:
    said = (
        "dp_replicate_size=2 x dp_shard_size=4 is not the number of processes, 16. Set dp_replicate_size: 4, or start 8"
    )
    with pytest.raises(UserError, match=said):
        grid_of(run(SIZES, 16))
    with pytest.raises(UserError, match=said):
        grid_of(run(SIZES, 8), processes=16)  # of a plan


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parallelism_config": SIZES}, "dp_replicate_size=2 and dp_shard_size=4 would be ignored without FSDP2"),
        ({"parallelism_config": {"dp_shard": 4}}, "there is no dp_shard. Did you mean 'dp_shard_size'?"),
        ({"parallelism_config": {"dp_shard_size": 0}}, "dp_shard_size=0 must be a whole number above 0"),
        ({"parallelism_config": {"dp_shard_size": True}}, "dp_shard_size=True must be a whole number above 0"),
        ({"fsdp": True, "parallelism_config": {"cp_size": 2}}, "cp_size=2: tensor, context and sequence"),
        ({"fsdp": True, "parallelism_config": {"dp_replicate_size": 4}}, "nothing is sharded. Remove it and"),
        ({"parallelism_config": [2, 4]}, "is not a mapping. Write {dp_replicate_size: 2, dp_shard_size: 4}"),
    ],
)
def test_what_masks_cannot_follow_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_arguments({"use_cpu": True, **values}, str(tmp_path))
    assert str(error.value).startswith("training.parallelism_config") and message in str(error.value)


def test_a_resumed_run_may_have_another_grid(tmp_path: Path) -> None:
    assert kind_of("training", "parallelism_config") == "free"
    assert training_values(TrainingArguments(str(tmp_path)))["parallelism_config"] is None
