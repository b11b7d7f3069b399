"""FSDP2 on gloo ranks trains as one process does, and each can resume the other's checkpoints."""

import io
import json
import logging
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
from transformers import AutoModelForCausalLM

from ast_sparse import SLoRBConfig, SparsityConfig, UserError
from ast_sparse.evaluation.perplexity import evaluate_blocks, evaluate_text
from ast_sparse.export.export import export_model
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.training.resume.checkpoints import faults, last_checkpoint
from tests.distributed import stage_facts
from tests.distributed.fsdp_facts import BEST, RANKS, RUNS, best, data, found, half, make
from tests.models import tiny_model, tiny_tokenizer
from tests.processes import run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of three ranks, which got a checkpoint from one process."""
    out = tmp_path_factory.mktemp("fsdp")
    slorb = SLoRBConfig(k=16, start=0.5)
    one = make(out / "plain", SparsityConfig(mask_interval=0), 1, slorb=slorb, save_strategy="steps", save_steps=2)
    one.train()
    (out / "stages").mkdir()
    stage_facts.write_inputs(out / "stages")
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
        assert rank[name]["sparsities"] == pytest.approx(expected["sparsities"], abs=1e-12)
        calls, made = rank[name]["calls with logits"]
        assert calls >= len(expected["losses"]) and made == 0  # the loss is that of hidden states
        assert rank[name]["recomputed"] == (name in ("recomputed", "sharded first"))
        assert rank[name]["gathered again"] == (name not in ("moving", "mobilebert"))
    assert facts[0][name]["masks"] == expected["masks"]
    assert (max(expected["sparsities"], default=None) == 0.5) == (name == "gmp")


def test_no_gradient_of_a_whole_parameter_is_kept_between_micro_batches(facts: list[dict[str, Any]]) -> None:
    trained = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    for rank in facts:
        (least, losses), (most, others) = (rank["whole gradients"][name] for name in ("by default", "once a step"))
        assert (least, most) == (0, 8 * trained)  # in float64
        assert losses == pytest.approx(others, abs=1e-12)


@pytest.mark.parametrize("dtype", ["bf16", "float32"])
@pytest.mark.parametrize("masks", ["fixed", "moving"])
def test_masked_weights_are_gathered_without_masks_and_loss_and_gradients_are_those_of_the_whole_model(
    facts: list[dict[str, Any]], dtype: str, masks: str
) -> None:
    for rank, gathered in enumerate(fact["gathers"][f"{dtype}, {masks}"] for fact in facts):
        assert gathered["bytes"] == (2 if dtype == "bf16" else 4)  # a parameter
        assert gathered["dtypes"] == ["torch.bfloat16" if dtype == "bf16" else "torch.float32"]
        assert gathered["masks"] and gathered["loss"], rank
        assert gathered["unequal"] == []
        assert (gathered["gradients of pruned"] == 0) == (masks == "fixed")


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
    facts: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
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


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_ranks_that_share_windows_find_the_perplexities_of_one_process(
    facts: list[dict[str, Any]], family: str, kind: str
) -> None:
    expected = stage_facts.perplexities(stage_facts.sparse_model(family))
    assert expected["4 x 16"][1] == 4 and expected["without SLoRB"][0] != expected["None x 40"][0]
    for rank in facts:
        found = rank["stages"][f"{family}, {kind}"]
        assert found.keys() == expected.keys()
        for name, (perplexity, *counts) in expected.items():
            assert found[name] == [pytest.approx(perplexity, rel=1e-6), *counts], name


def test_a_sharded_model_trained_in_16_bits_is_measured_in_32_and_then_computes_in_16_again(
    facts: list[dict[str, Any]],
) -> None:
    for family in ("llama", "mistral"):
        for rank in facts:
            before, after = rank["stages"][f"{family}, 16 bits"]
            full = rank["stages"][f"{family}, sharded"]["1 x 32"][0]
            assert before == after and 1e-6 < abs(before / full - 1) < 1e-2


def test_a_sharded_model_continues_prompts_as_a_whole_one_does(facts: list[dict[str, Any]]) -> None:
    for family in ("llama", "mistral"):
        expected = stage_facts.samples(stage_facts.sparse_model(family))
        assert all(rank["stages"][f"{family}, samples"] == expected for rank in facts)


def test_the_bad_window_is_the_first_over_all_ranks(facts: list[dict[str, Any]]) -> None:
    assert stage_facts.bad_windows(stage_facts.faulty_model()) == [2, 1, 6, None]
    for rank in facts:
        assert rank["stages"]["bad, whole"] == rank["stages"]["bad, sharded"] == [2, 1, 6, None]


def test_ranks_that_share_windows_find_the_divergence_of_one_process(facts: list[dict[str, Any]]) -> None:
    expected = stage_facts.against_teacher(stage_facts.sparse_model("llama"), tiny_model("llama", 1))
    for rank in facts:
        for kind in ("whole", "sharded"):
            assert rank["stages"][f"teacher, {kind}"] == pytest.approx(expected, rel=1e-6)


def test_the_stages_of_a_sharded_run_are_measured_as_one_process_measures_what_is_saved(out: Path) -> None:
    folder, figures = out / "stages", {}
    stage_facts.train(folder, 1)
    for world in (1, RANKS):
        results = json.loads((folder / f"out-{world}" / "results.json").read_text())
        figures[world] = {
            (stage, name): [value["perplexity"], value["windows"], value["predicted_tokens"]]
            for stage, row in results.items()
            for name, value in row.items()
        }
    assert figures[1].keys() == figures[RANKS].keys() and len(figures[1]) == 8
    for (stage, name), (perplexity, *counts) in figures[1].items():
        tolerance = 1e-2 if stage.startswith("retrained") else 1e-6  # trained in bf16
        assert figures[RANKS][stage, name] == [pytest.approx(perplexity, rel=tolerance), *counts], stage
    saved = folder / f"out-{RANKS}"
    loaded = {"": load_causal_lm(saved), " without SLoRB": AutoModelForCausalLM.from_pretrained(saved)}
    for without, model in loaded.items():
        text = evaluate_text(model, tiny_tokenizer(), stage_facts.TEXT, 16, 5, progress=False)
        assert figures[RANKS][f"retrained 2:4{without}", "other.txt"][0] == pytest.approx(text.perplexity, rel=1e-6)
    samples = [json.loads((folder / f"out-{world}" / "samples.json").read_text()) for world in (1, RANKS)]
    assert all(samples[0][stage] == samples[1][stage] for stage in ("dense", "one-shot 2:4"))
    logs = [
        json.loads((folder / f"out-{world}" / "trainer_state.json").read_text())["log_history"] for world in (1, RANKS)
    ]
    during = [[log["heldout_perplexity"] for log in each if "heldout_perplexity" in log] for each in logs]
    assert len(during[0]) == 1 and during[1] == pytest.approx(during[0], rel=1e-2)


def test_a_sharded_model_is_saved_file_by_file_as_the_whole_one_would_be(
    out: Path, facts: list[dict[str, Any]]
) -> None:
    assert all(rank["saved in pieces"]["saved"] for rank in facts)
    whole, pieces = out / "stages" / "whole", out / "stages" / "pieces"
    assert len(list(pieces.glob("model-*.safetensors"))) > 2
    parts = [load_file(file) for file in pieces.glob("model-*.safetensors")]
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    expected = load_file(whole / "model.safetensors")
    assert sum(map(len, parts)) == len(expected) and tensors.keys() == expected.keys()
    assert all(
        torch.equal(tensors[name].view(torch.int32), value.view(torch.int32)) for name, value in expected.items()
    )
    for name in ("config.json", "generation_config.json", "checksums.json", "sparsity_config.json"):
        assert json.loads((pieces / name).read_text()) == json.loads((whole / name).read_text()), name
    slorb = [load_file(folder / "slorb" / "adapter_model.safetensors") for folder in (whole, pieces)]
    assert slorb[0].keys() == slorb[1].keys() and all(torch.equal(slorb[1][name], slorb[0][name]) for name in slorb[0])
    index = json.loads((pieces / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())


def test_a_sharded_model_is_split_again_after_the_check_that_documents_are_apart(facts: list[dict[str, Any]]) -> None:
    assert all(rank["saved in pieces"]["split"] for rank in facts)


def test_a_saved_sharded_model_that_differs_or_cannot_be_written_ends_all_ranks(
    out: Path, facts: list[dict[str, Any]]
) -> None:
    assert all(rank["saved in pieces"]["read back"] for rank in facts)
    folder = out / "stages"
    for number, rank in enumerate(facts):
        damaged, missing, full = rank["saved in pieces"]["said"]
        assert damaged.startswith(f"SharedError: `{folder}/damaged` was written, but does not read back as the model")
        assert "differs. Export a checkpoint" in damaged
        assert missing.startswith(f"SharedError: `{folder}/missing` was written, but does not read back as the model")
        assert full.startswith("SharedError: " if number else ("OSError", "SafetensorError")), full
