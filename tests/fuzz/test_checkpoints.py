"""One fault in a checkpoint folder ends in one line, or in what the folder held before: never in other weights."""

import json
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import TrainerState

from ast_sparse.config import SLoRBConfig, SparsityConfig
from ast_sparse.errors import UserError
from ast_sparse.export.export import export_model
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.storage.checksums import write_checksums
from ast_sparse.storage.load import load_causal_lm, load_checkpoint
from ast_sparse.storage.save import save_sparse_model
from ast_sparse.training.resume.checkpoints import check_same_model, check_same_run, resolve_checkpoint
from tests.export.sparse_models import save_training_checkpoint, sparse_model
from tests.fuzz.mutate import mutate_bytes, mutate_folder, mutate_json, share

SPARSITY, SLORB = SparsityConfig(), SLoRBConfig(k=8)
LONGEST_MESSAGE = 2000

State = dict[str, Tensor]
Damage = Callable[[random.Random, Path], str]


@dataclass(frozen=True)
class Whole:
    """An undamaged folder and what it holds."""

    folder: Path
    state: State


def record(layers: list[str]) -> dict[str, Any]:
    return {"sparsity": SPARSITY.to_dict(), "slorb": SLORB.to_dict(), "pattern": "2:4", "layers": layers}


def save_run_checkpoint(folder: Path, family: str) -> None:
    model = sparse_model(family, 8)
    save_training_checkpoint(model, folder)
    write_checksums(folder)
    (folder / "sparsity_config.json").write_text(json.dumps(record(sorted(sparse_layers(model)))))
    moments = {index: {"exp_avg": p.detach().clone()} for index, p in enumerate(model.parameters())}
    torch.save({"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}, folder / "optimizer.pt")
    torch.save({"last_epoch": 3, "base_lrs": [1e-3]}, folder / "scheduler.pt")
    torch.save({"python": random.getstate(), "cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    state = TrainerState(global_step=3, max_steps=9, log_history=[{"loss": 1.5, "step": 3}])
    state.save_to_json(str(folder / "trainer_state.json"))


def save_final(folder: Path, family: str) -> None:
    model = sparse_model(family, 8)
    save_sparse_model(model, folder, record(sorted(sparse_layers(model))))


KINDS: dict[str, Callable[[Path, str], object]] = {
    "checkpoint": save_run_checkpoint,
    "final": save_final,
    "dense": lambda folder, family: export_model(sparse_model(family, 8), folder, "dense"),
    "compressed": lambda folder, family: export_model(sparse_model(family, 8), folder, "compressed"),
}


def held(folder: Path, dtype: Any = torch.float32) -> State:
    """Everything a folder gives: weights, masks, SLoRB, by names that differ."""
    checkpoint = load_checkpoint(folder, dtype=dtype)
    pairs = {f"{name}.slorb.{i}": pair[i] for name, pair in checkpoint.slorb.items() for i in range(2)}
    masks = {f"{name}.mask": mask for name, mask in checkpoint.masks.items()}
    return {**checkpoint.model.state_dict(), **masks, **pairs}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Whole]:
    root = tmp_path_factory.mktemp("whole")
    found = {}
    for kind, save in KINDS.items():
        for family in ("llama", "gpt2"):
            folder = root / family / kind / "checkpoint-3"
            save(folder, family)
            found[kind, family] = Whole(folder, held(folder))
    return found


def same(found: State, expected: State) -> bool:
    return (
        found.keys() == expected.keys()
        and all(
            value.dtype == expected[name].dtype if value.dtype == torch.bool else value.is_floating_point()
            for name, value in found.items()
        )
        and all(torch.equal(value, expected[name].to(value.dtype)) for name, value in found.items())
    )


def switched_off(folder: Path, found: State, expected: State) -> bool:
    """Whether SLoRB is missing because `sparsity_config.json` says so: a switch that people may use."""
    without = {name: value for name, value in expected.items() if ".slorb." not in name}
    if len(without) == len(expected) or found.keys() != without.keys():
        return False
    slorb = json.loads((folder / "sparsity_config.json").read_text()).get("slorb", True)
    return same(found, without) and (slorb in (None, False) or slorb.get("enabled") is False)


def damaged(whole: Whole, tmp_path: Path, seed: int, damage: Damage) -> tuple[Path, str]:
    folder = tmp_path / str(seed) / whole.folder.name
    shutil.copytree(whole.folder, folder)
    return folder, damage(random.Random(seed), folder)


def one_line(error: UserError) -> bool:
    return str(error).isprintable() and len(str(error)) <= LONGEST_MESSAGE


def seeds(part: float, tmp_path: Path) -> Iterator[int]:
    for seed in share(part):
        yield seed
        shutil.rmtree(tmp_path / str(seed))


def check_load(whole: dict[tuple[str, str], Whole], seed: int, tmp_path: Path) -> str:
    """One damaged folder, read by `load_checkpoint`, `load_causal_lm` or `export_model`; what came of it."""
    rng = random.Random(-seed)
    origin = whole[rng.choice(list(KINDS)), rng.choice(["llama", "llama", "gpt2"])]
    folder, done = damaged(origin, tmp_path, seed, mutate_folder)
    reader = rng.randrange(6)
    try:
        if reader == 0:
            load_causal_lm(folder)
        elif reader == 1:
            export_model(folder, folder.parent / "out", "dense", dtype="float32")
            found = held(folder.parent / "out")
            expected = {name: value for name, value in origin.state.items() if not name.endswith(".mask")}
            assert same(found, expected) or switched_off(folder, found, expected), f"seed {seed}: {done}"
        found = held(folder, "auto" if reader == 2 else torch.float32)
    except UserError as error:
        assert one_line(error), f"seed {seed}: {done}: {str(error)[:500]}"
        return "refused"
    assert same(found, origin.state) or switched_off(folder, found, origin.state), f"seed {seed}: {done}"
    return "loaded"


def not_at_all(rng: random.Random, folder: Path) -> str:
    return "nothing"


def check_plugin(whole: dict[tuple[str, str], Whole], seed: int, tmp_path: Path, damage: Damage = mutate_folder) -> str:
    """One damaged compressed export, read by transformers alone: its errors are its own, its weights are ours."""
    rng = random.Random(-seed)
    origin = whole["compressed", rng.choice(["llama", "gpt2"])]
    folder, done = damaged(origin, tmp_path, seed, damage)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds, our plugin two
        *_, last = traceback.walk_tb(error.__traceback__)
        is_ours = str(last[0].f_globals.get("__name__")).startswith("ast_sparse.")
        assert isinstance(error, ValueError | OSError) or not is_ours, f"seed {seed}: {done}: {error!r}"
        return "refused"
    expected = {name: value for name, value in origin.state.items() if ".slorb." not in name}
    assert same(model.state_dict(), expected), f"seed {seed}: {done}"
    return "loaded"


def damage_resumed(rng: random.Random, folder: Path) -> str:
    pick = rng.random()
    if pick < 0.3:
        file = folder / rng.choice(["optimizer.pt", "scheduler.pt", "rng_state.pth"])
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
        return f"{file.name}: bytes"
    if pick < 0.5:
        return mutate_json(rng, folder / rng.choice(["trainer_state.json", "sparsity_config.json"]))
    return mutate_folder(rng, folder)


def check_resume(
    whole: dict[tuple[str, str], Whole], seed: int, tmp_path: Path, damage: Damage = damage_resumed
) -> str:
    """One damaged training checkpoint: what passes for resuming holds what it held."""
    origin = whole["checkpoint", "llama"]
    folder, done = damaged(origin, tmp_path, seed, damage)
    layers = [name.removesuffix(".mask") for name in origin.state if name.endswith(".mask")]
    try:
        resolve_checkpoint(folder.parent, str(folder))
        check_same_run(folder, SPARSITY, SLORB, layers)
        check_same_model(folder, {name: tuple(origin.state[f"{name}.weight"].shape) for name in layers})
    except UserError as error:
        assert one_line(error), f"seed {seed}: {done}: {str(error)[:500]}"
        return "refused"
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    assert state.global_step == 3, f"seed {seed}: {done}"
    stored = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    expected = load_file(origin.folder / "model.safetensors")
    assert stored.keys() == expected.keys() and all(torch.equal(stored[k], expected[k]) for k in stored), done
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        old, new = (torch.load(path / name, weights_only=True) for path in (origin.folder, folder))
        assert str(old) == str(new), f"seed {seed}: {done}"
    return "loaded"


def test_damaged_folder_is_refused_in_one_line_or_loads_as_it_was(whole: Any, tmp_path: Path) -> None:
    outcomes = {check_load(whole, seed, tmp_path) for seed in seeds(0.3, tmp_path)}
    assert outcomes == {"refused", "loaded"}  # neither half of the question went unasked


def test_transformers_alone_never_loads_other_weights_from_a_damaged_export(whole: Any, tmp_path: Path) -> None:
    assert "refused" in {check_plugin(whole, seed, tmp_path) for seed in seeds(0.1, tmp_path)}


def test_damaged_training_checkpoint_is_refused_in_one_line_or_resumes_as_it_was(whole: Any, tmp_path: Path) -> None:
    assert "refused" in {check_resume(whole, seed, tmp_path) for seed in seeds(0.1, tmp_path)}


def test_an_undamaged_export_and_checkpoint_are_loaded(whole: Any, tmp_path: Path) -> None:
    """So that neither of the two tests above passes by refusing everything."""
    for name, check in (("export", check_plugin), ("checkpoint", check_resume)):
        assert check(whole, 0, tmp_path / name, not_at_all) == "loaded"
