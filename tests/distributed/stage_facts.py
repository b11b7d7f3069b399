"""What is measured of sharded and of whole models on several ranks; `fsdp_facts.py` calls this.

Every fact has a twin in one process, made by the same functions.
"""

import math
import os
import resource
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ast_sparse import SLoRBConfig, SparsityConfig, UserError
from ast_sparse.config import load_config
from ast_sparse.distributed.full_precision import computes_in_float32
from ast_sparse.evaluation import samples as evaluation_samples
from ast_sparse.evaluation.perplexity import evaluate_blocks, evaluate_text
from ast_sparse.evaluation.samples import continue_prompts
from ast_sparse.evaluation.scoring import score
from ast_sparse.export.readback import check_saved_pieces
from ast_sparse.run.train import run_training
from ast_sparse.sparsity.model import slorb_set_aside, sparsify_model
from ast_sparse.storage.save import save_sparse_model
from ast_sparse.storage.save_pieces import save_pieces
from ast_sparse.training.checks.packing import check_apart
from ast_sparse.training.sharding import frame_of
from tests.models import generated_text, save_tiny_model, tiny_model, tiny_tokenizer

TEXT = generated_text(30, seed=4)
PROMPTS = ["the sparse", "two of four"]
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
FAULTY = 5  # a token whose embedding is not finite
FEW_TOKENS = mock.patch.object(evaluation_samples, "_NEW_TOKENS", 10)  # of a continuation: each one is a whole pass


def sparse_model(family: str) -> Any:
    model = tiny_model(family)
    sparsify_model(model, SparsityConfig(), SLoRBConfig(k=16))
    return model


def faulty_model() -> Any:
    model: Any = tiny_model("mistral")
    model.model.embed_tokens.weight.data[FAULTY] = math.nan
    return model


def sharded(model: Any) -> Any:
    for block in model.model.layers:
        fully_shard(block, mp_policy=HALF)
    return fully_shard(model, mp_policy=HALF)


def perplexities(model: Any, shared: bool = False) -> dict[str, Any]:
    """By number of windows and tokens of each, so that some ranks have fewer than others, or none."""
    found = {}
    for windows, seq_len in ((1, 32), (2, 32), (4, 16), (None, 40)):
        result = evaluate_text(model, tiny_tokenizer(), TEXT, seq_len, windows, shared=shared, progress=False)
        found[f"{windows} x {seq_len}"] = [result.perplexity, result.windows, result.predicted_tokens]
    chat = [{"input_ids": list(range(8)), "labels": [-100] * (8 - count) + [1] * count} for count in (3, 0, 0, 5)]
    result = evaluate_blocks(model, chat, shared=shared, progress=False)
    found["chat"] = [result.perplexity, result.windows, result.predicted_tokens]
    with slorb_set_aside(model):
        aside = evaluate_text(model, tiny_tokenizer(), TEXT, 32, shared=shared, progress=False)
    found["without SLoRB"] = [aside.perplexity, aside.windows, aside.predicted_tokens]
    return found


def against_teacher(model: Any, teacher: Any, shared: bool = False) -> list[float]:
    blocks = [(list(range(number, number + 8)), 7) for number in range(10, 15)]
    sums = score(model, blocks, len(blocks), teacher=teacher, shared=shared, progress=False)
    return [sums.nll, sums.kl, sums.agreed]


def bad_windows(model: Any, shared: bool = False) -> list[int | None]:
    """The first faulty window of texts in which several or no windows have the faulty token."""
    found = []
    for faulty in ((4, 2), (1, 6), (6,), ()):
        blocks = [[FAULTY if window in faulty else 9, 10, 11, 12] for window in range(1, 8)]
        found.append(evaluate_blocks(model, blocks, shared=shared, progress=False).bad_window)
    return found


@FEW_TOKENS
def samples(model: Any) -> dict[str, str]:
    return continue_prompts(model, tiny_tokenizer(), PROMPTS)


def facts() -> dict[str, Any]:
    """Of this rank."""
    found: dict[str, Any] = {}
    for family in ("llama", "mistral"):  # with a tied and an untied head
        found[f"{family}, whole"] = perplexities(sparse_model(family), shared=True)
        model = sharded(sparse_model(family))
        half = perplexities(model)["1 x 32"][0]
        with computes_in_float32(model):
            found[f"{family}, sharded"], found[f"{family}, samples"] = perplexities(model), samples(model)
        found[f"{family}, 16 bits"] = [half, perplexities(model)["1 x 32"][0]]
    found["bad, whole"] = bad_windows(faulty_model(), shared=True)
    found["bad, sharded"] = bad_windows(sharded(faulty_model()))
    found["teacher, whole"] = against_teacher(sparse_model("llama"), tiny_model("llama", 1), shared=True)
    model, teacher = sharded(sparse_model("llama")), sharded(tiny_model("llama", 1))
    with computes_in_float32(model), computes_in_float32(teacher):
        found["teacher, sharded"] = against_teacher(model, teacher)
    return found


def write_inputs(folder: Path) -> None:
    """Model and text of `train`."""
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(generated_text(100))
    (folder / "other.txt").write_text(TEXT)


@FEW_TOKENS
def train(folder: Path, world: int, **training: Any) -> None:
    """A run of ast-train with all its stages, into `out-WORLD`."""
    tree: dict[str, Any] = {
        "model": {"name_or_path": str(folder / "model")},
        "data": {"root": str(folder), "train": "text.txt", "eval_share": 0.1, "block_size": 16},
        "basis": {"rotation_steps": 2},  # unties the head
        "sparsity": {"mask_interval": 2, "init": "sparsegpt"},
        "calibration": {"samples": 8, "recovery_epochs": 1},
        "slorb": {"k": 16},
        "training": {
            "max_steps": 3, "per_device_train_batch_size": 6 // world, "learning_rate": 3e-3, "report_to": "none",
            "use_cpu": True, "save_steps": 2, "disable_tqdm": True, "logging_steps": 1, "bf16": True,
            "fsdp": world > 1, **training,
        },
        "evaluation": {
            "datasets": ["heldout", "other.txt"], "seq_len": 16, "windows": 5, "steps": 2, "report": True,
            "prompts": PROMPTS,
        },
    }  # fmt: skip
    file = folder / f"run-{os.getpid()}.yaml"
    file.write_text(yaml.safe_dump(tree))
    run_training(load_config(file), str(folder / f"out-{world}"), echo=lambda line: None)


def saved(run: Any, out: Path) -> dict[str, Any]:
    """Save a sharded student in pieces and as a whole, and what is said of a damaged copy and of a full disk.

    Args:
        run: a trainer with SLoRB.
    """
    run.shard_student()
    student, frame, record = run.student, frame_of(run.student), run.sparsity_config_dict()
    check_apart(student, None, tiny_tokenizer(), run.args, None)
    found: dict[str, Any] = {"split": all(isinstance(each, DTensor) for each in student.parameters())}
    found["saved"] = save_pieces(student, frame, out / "pieces", record, file_bytes=20_000)
    whole = run.whole_student()
    if whole is not None:
        save_sparse_model(whole, out / "whole", record)
    found["read back"] = check_saved_pieces(student, frame, out / "pieces")
    if whole is not None:
        shutil.copytree(out / "pieces", out / "damaged")
        file = sorted((out / "damaged").glob("*.safetensors"))[0]
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, file, metadata={"format": "pt"})
    said = []
    for action in (
        lambda: check_saved_pieces(student, frame, out / "damaged"),
        lambda: check_saved_pieces(student, frame, out / "missing"),
        lambda: save_pieces(student, frame, out / "full", record),
    ):
        limit = 20_000 if len(said) == 2 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            action()
            said.append("")
        except (OSError, SafetensorError, UserError) as error:
            said.append(f"{type(error).__name__}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {**found, "said": said}
