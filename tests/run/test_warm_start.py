"""The start of a run whose first masks need text: made once, continued after a kill, and the same as in one process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ast_sparse.run.train as train_module
import ast_sparse.sparsity.pruning as pruning_module
from ast_sparse import CalibrationConfig, SLoRBConfig, SparsityConfig, UserError
from ast_sparse.basis.change import change_basis
from ast_sparse.config import BasisConfig, DataConfig, EvaluationConfig, ModelConfig, RunConfig
from ast_sparse.planning.plan import start_bytes
from ast_sparse.run.train import run_training
from ast_sparse.run.warm_start import BlockFiles, _key
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import sparsify_model
from ast_sparse.storage.files import read_json
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.rows import read_causal_lm
from ast_sparse.storage.tied import untie_head
from tests.hub_cache import OLDER, put_on_hub
from tests.models import generated_text, save_tiny_model, tiny_model

CALIBRATION = CalibrationConfig(samples=4, damping=0.1, recovery_epochs=1, recovery_learning_rate=1e-3)


OTHER = ("other.jsonl",)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    for seed, name in enumerate(("text", "other")):
        row = {"body": generated_text(60, seed), "text": "no"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def config(root: Path, init: str = "sparsegpt", basis: BasisConfig | None = None, **training: Any) -> RunConfig:
    given = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", **training,
    }  # fmt: skip
    return RunConfig(
        model=ModelConfig(name_or_path=str(root / "model")),
        data=DataConfig(root=str(root), train=("text.jsonl",), text_field="body", eval_share=0.1, block_size=16),
        sparsity=SparsityConfig(init=init, mask_interval=1),  # type: ignore[arg-type]
        slorb=SLoRBConfig(k=8, init="svd" if init == "sparsegpt" else "mean"),
        calibration=CALIBRATION,
        basis=basis,
        training=given,
        evaluation=EvaluationConfig(datasets=()),
    )


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trainers at the moment when training would begin, which stops the run, and the samples of their starts."""
    found: list[Any] = []
    warm_start = train_module.warm_start

    def start(run: Any, trainer: Any, samples: Any) -> None:
        found.append((trainer, samples))
        warm_start(run, trainer, samples)

    def stop(*args: Any) -> None:
        raise StopIteration

    monkeypatch.setattr(train_module, "warm_start", start)
    monkeypatch.setattr(train_module, "_train", stop)
    return found


def begin(config: RunConfig, out: Path, **options: Any) -> None:
    with pytest.raises(StopIteration):
        run_training(config, str(out), echo=lambda line: None, **options)


@pytest.mark.parametrize(
    ("init", "basis"), [("sparsegpt", None), ("magnitude", BasisConfig(rotation_steps=2, rotation_share=0.5))]
)
def test_a_run_begins_as_a_model_that_is_pruned_in_one_process(
    root: Path, starts: list[Any], monkeypatch: pytest.MonkeyPatch, init: str, basis: BasisConfig | None
) -> None:
    """From a revision on the hub; attention, damping and share are not the defaults."""
    calibration = CALIBRATION if init == "sparsegpt" else CalibrationConfig(samples=4, damping=0.1, data=OTHER)
    name = put_on_hub(save_tiny_model(root / "newer", seed=1), root / "hub", monkeypatch, older=root / "model")
    pinned = ModelConfig(name_or_path=name, revision=OLDER, attn_implementation="eager")
    settings = replace(config(root, init, basis), model=pinned, calibration=calibration)
    begin(settings, root / "out")
    ((trainer, samples),) = starts
    assert trainer.student.config._attn_implementation == "eager"
    model = tiny_model()
    model.set_attn_implementation("eager")
    if basis is not None:
        change_basis(model, basis, Pattern(2, 4), samples, damping=0.1)
    report = sparsify_model(model, settings.sparsity, settings.slorb, calibration_config=calibration, samples=samples)
    expected, found = model.state_dict(), trainer.student.state_dict()
    assert list(expected) == list(found) and all(torch.equal(value, found[name]) for name, value in expected.items())
    assert trainer.sparsity_report.errors == report.errors and trainer.sparsity_report.recovered == report.recovered
    dense = tiny_model().state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in trainer.teacher.state_dict().items())
    assert read_json(root / "out/start/start.json")["calibration"]["samples"] == 4
    written = [tensor.nbytes for file in root.glob("out/start/*.safetensors") for tensor in load_file(file).values()]
    assert sum(written) == start_bytes(settings, trainer.student)


def test_a_start_that_was_killed_continues_and_a_finished_one_is_used_again(
    root: Path, starts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned: list[str] = []
    prune_layer, write = pruning_module.prune_layer, BlockFiles.__setitem__

    def prune(name: str, weight: Any, method: str, *args: Any) -> Any:
        pruned.extend([name] if method == "sparsegpt" and not weight.is_meta else [])  # not those of the plan
        return prune_layer(name, weight, method, *args)  # type: ignore[arg-type]

    def killed(store: Any, name: str, block: Any) -> None:
        if name.endswith("1"):
            raise KeyboardInterrupt
        write(store, name, block)

    monkeypatch.setattr(pruning_module, "prune_layer", prune)
    monkeypatch.setattr(BlockFiles, "__setitem__", killed)
    with pytest.raises(KeyboardInterrupt):
        run_training(config(root), str(root / "out"), echo=lambda line: None)
    monkeypatch.setattr(BlockFiles, "__setitem__", write)
    pruned.clear()
    begin(config(root), root / "out", resume=True)
    assert len(pruned) == 7 and all(name.startswith("model.layers.1.") for name in pruned)
    begin(config(root), root / "whole")
    seconds = [read_json(root / out / "start/start.json")["seconds"] for out in ("out", "whole")]
    assert seconds[0] is None and seconds[1] is not None  # the time of the killed process is not known
    resumed, whole = (starts[index][0].student.state_dict() for index in (1, 2))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    pruned.clear()
    begin(config(root, learning_rate=1e-4), root / "whole", overwrite=True)
    assert not pruned and all(
        torch.equal(value, starts[3][0].student.state_dict()[name]) for name, value in whole.items()
    )
    tensors = load_file(root / "whole/start/model.layers.0.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    metadata = {"start": read_json(root / "whole/start/start.json")["key"], "results": "{}"}
    save_file(tensors, root / "whole/start/model.layers.0.safetensors", metadata)
    with pytest.raises(UserError, match=r"model\.layers\.0\.safetensors` is damaged"):
        run_training(config(root), str(root / "whole"), overwrite=True, echo=lambda line: None)


def test_a_start_is_another_one_with_other_settings_and_trains_to_the_end(root: Path) -> None:
    lines: list[str] = []
    run_training(config(root, "wanda"), str(root / "out"), echo=lines.append)
    assert any(line.startswith("start: wanda on 4 x 16 tokens") for line in lines)
    first = read_json(root / "out/start/start.json")["key"]
    run_training(config(root, "sparsegpt"), str(root / "out"), overwrite=True, echo=lines.append)
    assert read_json(root / "out/start/start.json")["key"] != first
    assert read_json(root / "out/sparsity_config.json")["base_model"] == str(root / "model")


def test_a_start_is_another_one_for_another_function_of_the_same_weights_and_for_other_first_masks(root: Path) -> None:
    samples, content = torch.zeros(1, 4, dtype=torch.int64), {"model": "weights", "model_config": {"rope_theta": 1e4}}
    settings = config(root, "magnitude", BasisConfig())
    key = _key(settings, content, samples)
    assert _key(config(root, "magnitude", BasisConfig(), learning_rate=1e-4), content | {"eval": "x"}, samples) == key
    assert _key(settings, {**content, "model_config": {"rope_theta": 1e6}}, samples) != key
    rounds = [SparsityConfig(schedule="imp", rounds=count) for count in (2, 4)]
    gradual = [_key(replace(settings, sparsity=each), content, samples) for each in rounds]
    assert len({key, *gradual}) == 3


def test_a_rotated_student_is_untied_saved_so_and_resumed(root: Path) -> None:
    settings = config(root, basis=BasisConfig(rotation_steps=2), save_strategy="steps", save_steps=1)
    run_training(settings, str(root / "out"), echo=lambda line: None)
    assert not read_json(root / "out/config.json")["tie_word_embeddings"]
    weights = load_file(root / "out/model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    loaded = load_causal_lm(root / "out").state_dict()
    assert torch.equal(loaded["lm_head.weight"], weights["lm_head.weight"])
    dense, one_shot = (read_json(root / "out/results.json")[stage] for stage in ("dense", "one-shot 2:4"))
    assert dense == one_shot == {}  # nothing is measured here, but both stages were passed
    shutil.rmtree(root / "out/checkpoint-2")
    (root / "out/model.safetensors").unlink()
    run_training(settings, str(root / "out"), resume=True, echo=lambda line: None)
    again = load_file(root / "out/model.safetensors")
    assert again.keys() == weights.keys() and all(torch.equal(value, again[name]) for name, value in weights.items())


def test_a_tied_checkpoint_is_read_into_an_untied_model(root: Path) -> None:
    whole, read = load_causal_lm(root / "model"), read_causal_lm(root / "model", untied=True)
    assert untie_head(whole) == whole.lm_head.weight.numel() and untie_head(whole) == 0
    assert read.lm_head.weight is not read.model.embed_tokens.weight
    found = read.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.state_dict().items())
