"""The start of a run whose first masks need text: made once, block by block, and read by every process.

`OUT/start/` has a file for each block (weights, packed masks, SLoRB) and `start.json`, which is written last. A run
that is killed in between continues with the next block. A run with the same model, settings and text takes it as it is.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ast_sparse.basis.change import change_basis
from ast_sparse.config import ModelConfig, RunConfig
from ast_sparse.distributed.pieces import local, rows_of, unwrapped_name
from ast_sparse.distributed.ranks import errors_shared, gather, once_per_folder, rank
from ast_sparse.errors import UserError, one_line
from ast_sparse.planning.plan import makes_start
from ast_sparse.run.checks import CheckedRun, slorb_of
from ast_sparse.schedules import sparsity_at
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import SparsityReport, sparse_layers, sparsify_model
from ast_sparse.sparsity.pruning import FinishedBlock
from ast_sparse.sparsity.select import decoder_blocks
from ast_sparse.storage.checksums import check_checksums, write_checksums
from ast_sparse.storage.files import read_json, write_json
from ast_sparse.storage.run_folder import START
from ast_sparse.training.start.reading import load_student
from ast_sparse.training.trainer import SparseTrainer

_RECORD = "start.json"
_REST = "rest"  # what is in no block, if it was changed too
_FORMAT_VERSION = 2


def needs_start(config: RunConfig, checkpoint: Path | None) -> bool:
    """Whether text decides the weights or masks that a run starts from; not if they come from a checkpoint."""
    return checkpoint is None and makes_start(config)


def load_options(model: ModelConfig) -> dict[str, Any]:
    """Arguments for loading the student."""
    keys = ("revision", "gguf_file", "attn_implementation", "trust_remote_code", "config_overrides")
    return {key: getattr(model, key) for key in keys}


class BlockFiles(MutableMapping[str, FinishedBlock]):
    """Finished blocks as files of a folder; those of another start, and damaged ones, are not there.

    Args:
        key: of this start.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def file(self, name: str) -> Path:
        """Where a block is."""
        return self.folder / f"{name}.safetensors"

    def _metadata(self, file: Path) -> dict[str, str]:
        try:
            with safe_open(file, "pt") as tensors:
                found = tensors.metadata() or {}
        except (OSError, SafetensorError):
            return {}
        return found if found.get("start") == self.key else {}

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._metadata(self.file(name)))

    def __getitem__(self, name: str) -> FinishedBlock:
        metadata = self._metadata(self.file(name))
        if not metadata:
            raise KeyError(name)
        with safe_open(self.file(name), "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
        results = json.loads(metadata["results"])
        recovered = None if results["recovered"] is None else tuple(results["recovered"])
        return FinishedBlock(tensors, results["errors"], recovered)

    def __setitem__(self, name: str, block: FinishedBlock) -> None:
        results = json.dumps({"errors": block.errors, "recovered": block.recovered})
        unfinished = self.folder / "unfinished"
        save_file(block.tensors, unfinished, {"format": "pt", "start": self.key, "results": results})
        os.replace(unfinished, self.file(name))

    def __delitem__(self, name: str) -> None:
        self.file(name).unlink()

    def __iter__(self) -> Iterator[str]:
        files = sorted(self.folder.glob("*.safetensors"))
        return (file.name.removesuffix(".safetensors") for file in files if self._metadata(file))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def remove_others(self) -> None:
        """Remove what belongs to another start."""
        for file in self.folder.glob("*.safetensors"):
            if not self._metadata(file):
                file.unlink()
        (self.folder / _RECORD).unlink(missing_ok=True)


def warm_start(run: CheckedRun, trainer: SparseTrainer, samples: Tensor) -> None:
    """Give the student the weights, masks and SLoRB of its start, in place; every process must call this.

    One process for each folder makes it, with the whole dense model in its memory and one block on its device. The
    others wait by the launcher's store. Then each process reads its rows.

    Args:
        trainer: its student is sparse, by magnitude.
        samples: `[sequences, tokens]` int64, to calibrate on.

    Raises:
        UserError: the method fails, or the folder cannot be written or is damaged.
    """
    key = gather(_key(run.config, trainer.run_record.content, samples))[0]
    store = BlockFiles(run.output / START, key)

    def work() -> None:
        try:
            _make(run, store, samples)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The start cannot be kept in {str(store.folder)!r}: {one_line(error)}. Make room there."
            ) from error

    once_per_folder(store.folder, work)
    with errors_shared():
        record = read_json(store.folder / _RECORD)
        _read(store, record["files"], trainer.student)
    recovered = {name: tuple(errors) for name, errors in record["recovered"].items()}
    trainer.sparsity_report = replace(trainer.sparsity_report, errors=record["errors"], recovered=recovered)


def _key(config: RunConfig, content: Mapping[str, Any], samples: Tensor) -> str:
    """A hash of everything that a start depends on.

    Args:
        content: fingerprints of the run, with those of the model on the first process.
    """
    slorb, sparsity = slorb_of(config), config.sparsity
    parts = {
        "format_version": _FORMAT_VERSION,
        "model": [content.get("model"), content.get("model_config")],  # the same weights may compute something else
        "text": hashlib.sha256(samples.numpy().tobytes()).hexdigest(),
        "calibration": config.calibration.to_dict(),
        "basis": None if config.basis is None else config.basis.to_dict(),
        "sparsity": [sparsity.pattern, sparsity.init, list(sparsity.include), list(sparsity.exclude)],
        "schedule": [sparsity.schedule, sparsity_at(sparsity, 0, sparsity.rounds)],  # the share that is pruned first
        "slorb": None if slorb is None else [slorb.k, slorb.init, slorb.start == 0, slorb.train_projection],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is_complete(store: BlockFiles) -> bool:
    try:
        record = read_json(store.folder / _RECORD)
    except UserError:
        return False
    return record.get("key") == store.key and all(name in store for name in record["files"])


def _make(run: CheckedRun, store: BlockFiles, samples: Tensor) -> None:
    """Fill the folder, unless it is full."""
    config, args = run.config, run.args
    says = bool(args.should_log)
    if _is_complete(store):
        if rank() == 0:  # the others have waited for this one
            check_checksums(store.folder, [store.file(name) for name in read_json(store.folder / _RECORD)["files"]])
        return
    store.folder.mkdir(parents=True, exist_ok=True)
    store.remove_others()
    is_continued = bool(store)
    if says and is_continued:
        run.echo(f"start: continued after {len(store)} finished blocks in {store.folder}")
    began, shown = time.monotonic(), says and not args.disable_tqdm
    seed = args.seed if config.model.random_weights else None
    model = load_student(config.model.name_or_path, args, whole=True, seed=seed, **load_options(config.model))
    lines = []
    changes = config.basis is not None and config.basis.is_on
    if config.basis is not None and changes:
        lines = _change(model, run, samples, shown)
    report = sparsify_model(
        model,
        config.sparsity,
        slorb_of(config),
        calibration_config=config.calibration,
        samples=samples,
        device=args.device,
        progress=shown,
        finished=store,
    )
    names = _complete(store, model, report, changes)
    seconds = time.monotonic() - began
    write_checksums(store.folder, [store.file(name) for name in names])
    record = {
        "format_version": _FORMAT_VERSION,
        "key": store.key,
        "model": config.model.name_or_path,
        "method": config.sparsity.init,
        "pattern": config.sparsity.pattern,
        "calibration": config.calibration.to_dict(),
        "samples": list(samples.shape),
        "seconds": None if is_continued else round(seconds, 1),  # those of a killed process are not known
        "files": names,
        "errors": report.errors,
        "recovered": report.recovered,
        "basis": lines,
    }
    write_json(store.folder / _RECORD, record, durable=True)
    if says:
        size = " x ".join(str(each) for each in samples.shape)
        run.echo("\n".join([*lines, f"start: {config.sparsity.init} on {size} tokens, {seconds:.0f} s"]))


def _change(model: PreTrainedModel, run: CheckedRun, samples: Tensor, shown: bool) -> list[str]:
    """Change the basis of the dense model, in place; returns what was done."""
    config = run.config
    assert config.basis is not None, "it is on"
    report = change_basis(
        model,
        config.basis,
        Pattern.of(config.sparsity),
        samples,
        seed=config.calibration.seed,
        damping=config.calibration.damping,
        device=run.args.device,
        progress=shown,
    )
    return report.lines()


def _complete(store: BlockFiles, model: PreTrainedModel, report: SparsityReport, is_changed: bool) -> list[str]:
    """Write what pruning has not written: blocks of a method without text, and what a new basis changes elsewhere.

    Returns:
        The names of all files, in the order in which they are read.
    """
    blocks = list(decoder_blocks(model))
    named = {name: value for name, value in model.named_parameters() if not name.endswith(".mask")}
    for block in blocks:
        if block not in store:
            inside = {name: value for name, value in named.items() if name.startswith(f"{block}.")}
            errors = {name: error for name, error in report.errors.items() if name.startswith(f"{block}.")}
            store[block] = FinishedBlock(_copies(inside), errors)
    if is_changed:
        prefixes = tuple(f"{block}." for block in blocks)
        rest = {name: value for name, value in named.items() if not name.startswith(prefixes)}
        store[_REST] = FinishedBlock(_copies(rest), {})
    return [*blocks, _REST] if is_changed else blocks


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _read(store: BlockFiles, names: list[str], student: PreTrainedModel) -> None:
    """Copy each process's rows of all tensors into the student, and unpack its masks."""
    parameters = {unwrapped_name(name): each for name, each in student.named_parameters(remove_duplicate=False)}
    for name in names:
        with safe_open(store.file(name), "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # it is no mapping
                parameter = parameters[key]
                is_scalar = parameter.dim() == 0
                rows = tensors.get_tensor(key) if is_scalar else tensors.get_slice(key)[rows_of(parameter)]
                local(parameter).copy_(rows)
    for layer in sparse_layers(student).values():
        local(layer.mask).copy_(layer.unpacked_start_mask())
