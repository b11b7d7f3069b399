"""FSDP2 on gloo ranks trains as one process does, and each can resume the other's checkpoints."""

import io
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from ast_sparse import SLoRBConfig, SparsityConfig, UserError
from ast_sparse.evaluation.perplexity import evaluate_blocks
from ast_sparse.export.export import export_model
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.training.resume.checkpoints import faults, last_checkpoint
from tests.distributed.fsdp_facts import BEST, RANKS, RUNS, best, data, found, half, make
from tests.models import tiny_model
from tests.processes import run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of three ranks, which got a checkpoint from one process."""
    out = tmp_path_factory.mktemp("fsdp")
    slorb = SLoRBConfig(k=16, start=0.5)
    one = make(out / "plain", SparsityConfig(mask_interval=0), 1, slorb=slorb, save_strategy="steps", save_steps=2)
    one.train()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    command = [sys.executable, *launch, "-m", "tests.distributed.fsdp_facts", str(out)]
    finished = run_command(command)
    assert finished.returncode == 0, finished.stderr[-5000:]
    assert "UserWarning: FSDP2" not in finished.stderr
    return out


@pytest.fixture(scope="module")
def facts(out: Path) -> list[dict[str, Any]]:
    """By rank."""
    facts = json.loads((out / "facts.json").read_text())
    assert len(facts) == RANKS
    return facts


@pytest.mark.parametrize("name", RUNS)
def test_three_uneven_pieces_train_as_one_process(facts: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    run = RUNS[name](tmp_path, 1)
    run.train()
    expected = found(run)
    for rank in facts:
        assert rank[name]["losses"] == pytest.approx(expected["losses"], abs=1e-5)
        assert rank[name]["flip rates"] == pytest.approx(expected["flip rates"], abs=1e-12)
        calls, made = rank[name]["calls with logits"]
        assert calls >= len(expected["losses"]) and made == 0  # the loss is that of hidden states
    assert facts[0][name]["masks"] == expected["masks"]


def test_no_gradient_of_a_whole_parameter_is_kept_between_micro_batches(facts: list[dict[str, Any]]) -> None:
    trained = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    for rank in facts:
        (least, losses), (most, others) = (rank["whole gradients"][name] for name in ("by default", "once a step"))
        assert (least, most) == (0, 8 * trained)  # in float64
        assert losses == pytest.approx(others, abs=1e-12)


def test_every_mask_fits_its_weight_after_each_refresh(facts: list[dict[str, Any]]) -> None:
    assert all(rank["masks fit"] == [True] * 3 for rank in facts)


def test_half_of_the_pruned_layers_is_zero_after_save_and_export(out: Path) -> None:
    layers = json.loads((out / "moving" / "sparsity_config.json").read_text())["layers"]
    saved = load_file(out / "moving" / "model.safetensors")
    exported = load_causal_lm(out / "exported").state_dict()
    for name in layers:
        assert (saved[f"{name}.weight"] == 0).double().mean() == 0.5
        assert torch.equal(exported[f"{name}.weight"], saved[f"{name}.weight"].bfloat16().float())


def test_weights_masks_moments_slorb_and_teacher_are_sharded_and_masters_stay_float32(
    facts: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = half(tmp_path, 1)
    run.train()
    expected = pytest.approx(found(run)["losses"], rel=1e-3)  # bf16 has three digits
    masters = {name: [True, "torch.float32"] for name in ("weight", "S", "X", "moment")}
    others = {"mask": [True, "torch.bool"], "start_mask": [True, "torch.uint8"], "teacher": [True, "torch.bfloat16"]}
    for rank in facts:
        assert rank["bf16"]["tensors"] == {**masters, **others} and rank["bf16"]["computed in"] == ["torch.bfloat16"]
        assert rank["bf16"]["losses"] == expected


def test_a_sharded_run_continues_a_sharded_run_and_one_of_one_process(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        for name in ("resumed", "resumed from one process"):
            assert rank[name]["losses"] == pytest.approx(rank["saved"]["losses"], abs=1e-5)


def test_a_sharded_checkpoint_is_resumed_by_one_process(out: Path, facts: list[dict[str, Any]], tmp_path: Path) -> None:
    run = make(tmp_path, SparsityConfig(mask_interval=0), 1, slorb=SLoRBConfig(k=16, start=0.5))
    run.train(resume_from_checkpoint=str(out / "saved" / "checkpoint-2"))
    assert found(run)["losses"] == pytest.approx(facts[0]["saved"]["losses"], abs=1e-5)


def test_a_sharded_checkpoint_is_read_and_exported_like_any_other(out: Path, tmp_path: Path) -> None:
    run, checkpoint = out / "saved", out / "saved" / "checkpoint-6"
    export_model(checkpoint, tmp_path / "exported", "dense", dtype="float32")
    exported, saved = load_file(tmp_path / "exported" / "model.safetensors"), load_file(run / "model.safetensors")
    assert exported.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name].float()) for name, tensor in exported.items())
    assert (tmp_path / "exported" / "slorb" / "adapter_config.json").is_file()
    perplexities = [evaluate_blocks(load_causal_lm(each), data(), 4).perplexity for each in (checkpoint, run)]
    assert perplexities[0] == perplexities[1]
    assert list(run.glob(".*")) == []


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def _write_evil_metadata(folder: Path) -> None:
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(pickle.dumps(Evil()))


def _write_evil_value(folder: Path) -> None:
    """Replaces a value in the optimizer's groups, which torch would unpickle."""
    metadata = FileSystemReader(folder / "optimizer_0").read_metadata()
    place = next(place for index, place in metadata.storage_data.items() if index.fqn.endswith(".betas"))
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    shard = folder / "optimizer_0" / place.relative_path
    place.offset, place.length = shard.stat().st_size, len(buffer.getvalue())
    shard.write_bytes(shard.read_bytes() + buffer.getvalue())
    (folder / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(metadata))


def _flip(folder: Path) -> None:
    shard = folder / "optimizer_0" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "half written": (lambda folder: (folder / "pytorch_model_fsdp_0" / ".metadata").unlink(), r"\.metadata is missing"),
    "no shard": (lambda folder: (folder / "optimizer_0" / "__2_0.distcp").unlink(), r"__2_0\.distcp is missing"),
    "cut": (lambda folder: os.truncate(folder / "optimizer_0" / "__0_0.distcp", 999), r"__0_0\.distcp is truncated"),
    "flipped": (_flip, r"optimizer_0/__1_0\.distcp does not have the checksum"),
    "evil metadata": (_write_evil_metadata, r"posix\.mkdir is not part of a description of tensors"),
    "evil value": (_write_evil_value, r"\.metadata is damaged .*Weights only load failed"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_sharded_checkpoint_runs_no_code_and_the_one_before_is_used(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (4, 6):
        shutil.copytree(out / "saved" / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damage, message = DAMAGES[name]
    damage(tmp_path / "checkpoint-6")
    assert any(re.search(message, fault) for fault in faults(tmp_path / "checkpoint-6"))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        load_causal_lm(tmp_path / "checkpoint-6")
    assert not (tmp_path / "evil").exists()


def test_the_best_checkpoint_is_loaded_at_the_end_and_a_model_is_evaluated_before_it_trains(
    facts: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = best(make(tmp_path, SparsityConfig(mask_interval=0), 1, **BEST))
    assert "missing keys" not in caplog.text  # for a tied head
    assert expected["best"][0] == "checkpoint-4" and expected["before and after"][1] == expected["best"][1]
    for rank in facts:
        assert rank["best"]["best"] == ["checkpoint-4", pytest.approx(expected["best"][1], abs=1e-5)]
        for key in ("losses", "before and after"):
            assert rank["best"][key] == pytest.approx(expected[key], abs=1e-5)


def test_a_signal_to_one_rank_saves_all_pieces_and_the_run_continues_as_if_uninterrupted(
    out: Path, facts: list[dict[str, Any]]
) -> None:
    first, last = (str(out / "preempted" / f"checkpoint-{step}") for step in (3, 4))
    assert facts[0]["preempted"][:2] == [
        f"A signal to another rank: saved {first}; --resume continues from there.",
        f"SIGTERM: saved {last}; --resume continues from there.",
    ]
    for rank in facts:
        assert rank["preempted"][2] == pytest.approx(rank["undisturbed"]["losses"], abs=1e-12)
    assert all(rank["preempted"][:2] == ["", ""] for rank in facts[1:])


def test_a_save_without_space_ends_in_one_line_and_leaves_the_last_good_checkpoint(
    out: Path, facts: list[dict[str, Any]]
) -> None:
    folder = out / "full"
    for rank in facts:
        message, left = rank["no space"]
        assert message.startswith(f"Cannot write `{folder}/checkpoint-6`: ")
        assert message.endswith(f"Last good checkpoint: {folder}/checkpoint-3. Make room, then use --resume.")
    assert left == ["checkpoint-3"] and faults(folder / "checkpoint-3") == []
