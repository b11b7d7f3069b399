"""`model.random_weights` (Fig. 2): the student starts from random weights, the teacher does not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ast_sparse.cli.train import main
from ast_sparse.storage.load import random_causal_lm
from tests.models import generated_text, save_tiny_model, tiny_config


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "model": {"name_or_path": str(folder / "model"), "random_weights": True},
        "data": {"root": str(folder), "train": "text.txt", "eval_share": 0.1, "block_size": 16},
        "sparsity": {"mask_interval": 2},
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none",
            "use_cpu": True, "save_steps": 2, "disable_tqdm": True, "seed": 7,
        },
    }  # fmt: skip
    for name, values in changes.items():
        tree[name] = {**tree.get(name, {}), **values}
    return tree


def train(folder: Path, out: str, *options: str, **changes: Any) -> Result:
    (folder / "run.yaml").write_text(yaml.safe_dump(config(folder, **changes)))
    arguments = ["--config", str(folder / "run.yaml"), "--output-dir", str(folder / out), *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(generated_text(100))
    return folder


def test_random_weights_are_those_of_the_seed_and_leave_the_random_state_alone(folder: Path) -> None:
    torch.manual_seed(7)
    expected = AutoModelForCausalLM.from_config(tiny_config("llama"))
    state = torch.random.get_rng_state()
    model = random_causal_lm(folder / "model", 7, attn_implementation="eager", config_overrides={"rms_norm_eps": 1e-3})
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert not model.training and model.dtype == torch.float32
    assert model.config._attn_implementation == "eager" and model.config.rms_norm_eps == 1e-3
    other = random_causal_lm(folder / "model", 8)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_the_run_starts_from_random_weights_and_its_teacher_is_the_pretrained_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ast_sparse.run import train as run

    made: list[dict[str, Any]] = []

    class Spy(run.SparseTrainer):
        def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
            student = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            super().__init__(model, *args, **kwargs)
            made.append({"student": student, "teacher": self.teacher.state_dict()})

    monkeypatch.setattr(run, "SparseTrainer", Spy)
    result = train(folder, "spied")
    assert "weights: random, from training.seed=7" in result.output
    pretrained = load_file(folder / "model/model.safetensors")
    start = random_causal_lm(folder / "model", 7).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in made[0]["student"].items())
    assert all(torch.equal(tensor, made[0]["teacher"][name]) for name, tensor in pretrained.items())
    assert not torch.equal(start["model.embed_tokens.weight"], pretrained["model.embed_tokens.weight"])
    stages = json.loads((folder / "spied/results.json").read_text())
    assert list(stages) == ["random", "one-shot 2:4", "retrained 2:4"]


def test_a_resumed_run_ends_like_the_one_that_was_not(folder: Path) -> None:
    train(folder, "whole")
    train(folder, "again", "--resume", str(folder / "whole/checkpoint-2"))
    whole, again = (load_file(folder / out / "model.safetensors") for out in ("whole", "again"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    assert next(iter(json.loads((folder / "again/results.json").read_text()))) == "random"


@pytest.mark.parametrize("teacher", [None, "model"])
def test_a_folder_without_weights_is_enough_where_the_teacher_is_not_in_it(folder: Path, teacher: str | None) -> None:
    bare = folder / "bare"
    save_tiny_model(bare)
    (bare / "model.safetensors").unlink()
    changes: dict[str, Any] = {"model": {"name_or_path": str(bare)}, "distillation": {"alpha": 0.0}}
    if teacher:
        changes = {"model": {"name_or_path": str(bare), "teacher": str(folder / teacher)}}
    train(folder, f"bare-{teacher}", **changes)
