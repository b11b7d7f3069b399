import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainingArguments

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.storage.checksums import write_checksums
from ast_sparse.training.resume.checkpoints import check_same_model, check_same_run, last_checkpoint, resolve_checkpoint
from ast_sparse.training.trainer import SparseTrainer
from tests.fuzz.mutate import evil_pickle
from tests.models import VOCAB, tiny_model

STATES = {
    "optimizer.pt": {"state": {}, "param_groups": []},
    "scheduler.pt": {"last_epoch": 1},
    "rng_state.pth": {"cpu": torch.get_rng_state()},
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sparsity_config.json")


def checkpoint(run: Path, step: int, without: str | None = None, state: str = "{}") -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        if name == without:
            continue
        if name.endswith(".json"):
            (folder / name).write_text("{}")
        elif name.endswith(".safetensors"):
            save_file({"a.weight": torch.zeros(4, 8)}, folder / name)
        else:
            torch.save(STATES[name], folder / name)
    (folder / "trainer_state.json").write_text(state)
    return folder


def test_the_newest_complete_checkpoint_is_taken_by_step_not_by_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, 90)
    newest = checkpoint(tmp_path, 100)
    assert last_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("missing", FILES)
def test_a_half_written_checkpoint_is_skipped(tmp_path: Path, missing: str) -> None:
    before = checkpoint(tmp_path, 10)
    half = checkpoint(tmp_path, 20, without=missing)
    assert last_checkpoint(tmp_path) == before
    with pytest.raises(UserError, match=f"not a complete training checkpoint: {missing} is missing"):
        resolve_checkpoint(tmp_path, str(half))


@pytest.mark.parametrize("cut", FILES)
def test_a_cut_file_is_named_and_its_checkpoint_skipped(tmp_path: Path, cut: str) -> None:
    before = checkpoint(tmp_path, 10)
    damaged = checkpoint(tmp_path, 20)
    content = (damaged / cut).read_bytes()
    (damaged / cut).write_bytes(content[: len(content) // 2])
    assert last_checkpoint(tmp_path) == before
    with pytest.raises(UserError, match=rf"not a complete training checkpoint: .*{cut}.? is damaged"):
        resolve_checkpoint(tmp_path, str(damaged))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    before, marker = checkpoint(tmp_path, 10), tmp_path / "ran"
    evil = checkpoint(tmp_path, 20)
    for content in (evil_pickle(marker), evil_pickle(marker, **STATES[name])):
        (evil / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} contains more than numbers, text and tensors, so it is not read"):
            resolve_checkpoint(tmp_path, str(evil))
    assert last_checkpoint(tmp_path) == before and not marker.exists()


def test_trainer_does_not_run_a_pickle_of_its_checkpoint(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": torch.randint(0, VOCAB, (8, 8)).tolist()})
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=2,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
    )
    SparseTrainer(tiny_model(), args, train_dataset=rows).train()
    marker = tmp_path / "ran"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        folder = Path(shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name / "checkpoint-1"))
        (folder / name).write_bytes(evil_pickle(marker))
        with pytest.raises(UserError, match="contains more than numbers") as caught:
            SparseTrainer(tiny_model(), args, train_dataset=rows).train(resume_from_checkpoint=str(folder))
        assert str(caught.value).isprintable() and not marker.exists()
    folder = Path(shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "arguments/checkpoint-1"))
    (folder / "training_args.bin").write_bytes(evil_pickle(marker))
    SparseTrainer(tiny_model(), args, train_dataset=rows).train(resume_from_checkpoint=str(folder))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_next_to_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name} is pickled, which is not read"):
        resolve_checkpoint(tmp_path, str(folder))


def test_flipped_bit_of_a_state_is_noticed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    content = (folder / "rng_state.pth").read_bytes()
    at = content.index(STATES["rng_state.pth"]["cpu"].numpy().tobytes()[:64]) + 40
    (folder / "rng_state.pth").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(UserError, match=r"rng_state\.pth is damaged"):
        resolve_checkpoint(tmp_path, str(folder))


def test_state_file_in_place_of_another_is_noticed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    shutil.copyfile(folder / "optimizer.pt", folder / "scheduler.pt")
    with pytest.raises(UserError, match=r"scheduler\.pt is damaged"):
        resolve_checkpoint(tmp_path, str(folder))


def test_changed_weights_are_noticed_if_there_are_checksums(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    write_checksums(folder)
    assert last_checkpoint(tmp_path) == folder
    save_file({"a.weight": torch.ones(4, 8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"`a\.weight` does not have the checksum it was written with"):
        resolve_checkpoint(tmp_path, str(folder))
    save_file({"b.weight": torch.zeros(4, 8)}, folder / "model.safetensors")  # Trainer would start it at random
    with pytest.raises(UserError, match=r"holds `b\.weight`, which checksums\.json does not list"):
        resolve_checkpoint(tmp_path, str(folder))


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ('{"unknown": 1}', "is damaged"),
        ('{"global_step": "10"}', "is damaged"),
        ('{"global_step": -1}', "is damaged"),
        ('{"global_step": 20}', "is from step 20"),
        ('{"epoch": "x"}', "is damaged"),
        ('{"max_steps": 1e999}', "is damaged"),
        ('{"epoch": NaN}', "is damaged"),
        ('{"epoch": 1' + "0" * 400 + "}", "is damaged"),
        ('{"log_history": 5}', "is damaged"),
        ('{"stateful_callbacks": ["x"]}', "is damaged"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_trainer_state_that_cannot_be_resumed_is_noticed(tmp_path: Path, state: str, fault: str) -> None:
    folder = checkpoint(tmp_path, 10, state=state)
    with pytest.raises(UserError, match=rf"trainer_state\.json {fault}"):
        resolve_checkpoint(tmp_path, str(folder))


def test_another_model_is_named_by_a_layer(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    check_same_model(folder, {"a": (4, 8)})
    with pytest.raises(UserError, match=r"`a` has shape \(4, 16\) in the model and \(4, 8\) in .*checkpoint-10'"):
        check_same_model(folder, {"a": (4, 16)})


def test_a_cut_trainer_state_marks_a_half_written_checkpoint(tmp_path: Path) -> None:
    before = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20, state='{"global_step": 2')
    assert last_checkpoint(tmp_path) == before


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing to resume"):
        resolve_checkpoint(tmp_path, True)
    with pytest.raises(UserError, match="is not a folder"):
        resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))


def recorded(**sparsity: object) -> str:
    return json.dumps({"sparsity": {"pattern": "2:4", **sparsity}, "slorb": None, "layers": ["a", "b"]})


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / "sparsity_config.json").write_text(recorded(mask_interval=10))
    check_same_run(folder, SparsityConfig(), None, ["a", "b"])
    with pytest.raises(UserError, match=r"sparsity.mask_interval=20 differs from 10"):
        check_same_run(folder, SparsityConfig(mask_interval=20), None, ["a", "b"])
    with pytest.raises(UserError, match=r"slorb\.enabled=True differs from False"):
        check_same_run(folder, SparsityConfig(), SLoRBConfig(), ["a", "b"])
    with pytest.raises(UserError, match="'c' is pruned in only one"):
        check_same_run(folder, SparsityConfig(), None, ["a", "b", "c"])


def test_a_setting_the_checkpoint_does_not_know_had_its_default(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / "sparsity_config.json").write_text(recorded())
    check_same_run(folder, SparsityConfig(), None, ["a", "b"])
    with pytest.raises(UserError, match=r"sparsity.decay_ramp=0.5 differs from 0.25"):
        check_same_run(folder, SparsityConfig(decay_ramp=0.5), None, ["a", "b"])


def test_a_damaged_sparsity_config_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 10)
    (folder / "sparsity_config.json").write_text('{"sparsity": ')
    with pytest.raises(UserError, match=r"sparsity_config\.json cannot be read"):
        check_same_run(folder, SparsityConfig(), None, [])


def test_a_run_of_an_earlier_version_that_pruned_a_router_gets_the_reason_why_it_cannot_continue(
    tmp_path: Path,
) -> None:
    router = "model.layers.0.mlp.shared_expert_gate"
    (tmp_path / "sparsity_config.json").write_text(json.dumps({"sparsity": {}, "slorb": {}, "layers": ["a", router]}))
    with pytest.raises(UserError, match=rf"{router}' is pruned in only one .* Earlier versions also pruned routers"):
        check_same_run(tmp_path, SparsityConfig(), None, ["a"])
    with pytest.raises(UserError, match=r"include/exclude of the run\.$"):  # from another model
        check_same_run(tmp_path, SparsityConfig(), None, ["a", "b"])


def test_settings_of_speed_and_memory_may_be_others(tmp_path: Path) -> None:
    """As a run decides them by the memory of its machine."""
    folder = checkpoint(tmp_path, 10)
    (folder / "sparsity_config.json").write_text(recorded(fast_forward="on", masked_weights="made", kernels="eager"))
    assert check_same_run(folder, SparsityConfig(), None, ["a", "b"]) == []  # auto, as in a dry run
    other = SparsityConfig(fast_forward="off", masked_weights="kept", kernels="compiled")
    assert check_same_run(folder, other, None, ["a", "b"]) == [
        "resume: sparsity.kernels 'eager' -> 'compiled'",
        "resume: sparsity.fast_forward 'on' -> 'off'",
        "resume: sparsity.masked_weights 'made' -> 'kept'",
    ]
    same = SparsityConfig(fast_forward="on", masked_weights="made", kernels="eager")
    assert check_same_run(folder, same, None, ["a", "b"]) == []
