"""The models of a report in one table: the stages of runs and the measured models, each once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ast_sparse.config import ModelConfig
from ast_sparse.errors import UserError
from ast_sparse.evaluation.measure import TextResult
from ast_sparse.export.formats import codec_of
from ast_sparse.sparsity.model import decoder_blocks
from ast_sparse.storage import files
from ast_sparse.storage.locate import load_model_config
from ast_sparse.storage.run_folder import Run, is_run
from ast_sparse.storage.sparsity_record import SparsityRecord
from ast_sparse.storage.stage_results import PROTOCOL, is_result

Counts = dict[str, tuple[int, int]]  # weights that are not zero and all weights, by layer name


class Protocol(NamedTuple):
    """What a perplexity was measured on; two perplexities are comparable if all of it is the same."""

    text: str
    seq_len: int
    stride: int | None
    windows: int
    predicted_tokens: int
    total_tokens: int
    join: str | None
    bos: str | None

    def __str__(self) -> str:
        text = f"{self.text}, {self.windows:,} × {self.seq_len:,} of {self.total_tokens:,} tokens"
        text += f", stride {self.stride:,}" if self.stride is not None else ""
        text += f", join {self.join}" if self.join not in (None, "blank-line") else ""
        return text + {"document": ", BOS first", "window": ", BOS in every window"}.get(str(self.bos), "")


@dataclass(kw_only=True)
class ModelRow:
    """A model: what it is, its size and its perplexities.

    Attributes:
        kind: the stage of a run or the format of a folder.
        zeros: share of the weights that are zero in the linear layers of the blocks.
        size: bytes of its weight files.
        samples: continuations by prompt.
    """

    name: str
    kind: str
    zeros: float | None = None
    size: int | None = None
    perplexities: dict[Protocol, float | None] = field(default_factory=dict)
    samples: Mapping[str, str] = field(default_factory=dict)


def model_rows(
    runs: Mapping[str, Run],
    texts: Sequence[tuple[str, str, str, TextResult]],
    names: Mapping[str, str],
    counts: Mapping[str, Counts],
    samples: Mapping[str, Mapping[str, str]],
) -> list[ModelRow]:
    """A row for every stage of a run and every measured model; a stage that is also a measured model has one row.

    Args:
        runs: by the name they are shown under.
        texts: model, text, dtype and result, as `Results.texts`.
        names: every measured model, and the name it is shown under.
        counts, samples: weights of the linear layers, and continuations by prompt, of the measured models.
    """
    rows: dict[Any, ModelRow] = {}
    for label, run in runs.items():
        for stage, results in run.stages.items():
            row = rows.setdefault(_stage_key(run, stage), _stage_row(label if len(runs) > 1 else "", run, stage))
            for dataset, measured in results.items():
                text = "wikitext2 test" if dataset == "wikitext2" else Path(dataset).name  # as ast-eval calls it
                row.perplexities[_protocol_of(text, _completed(run, dataset, measured))] = measured.get("perplexity")
            row.samples = run.samples.get(stage, {})
    for model, label in names.items():
        row = rows.setdefault(_key(model), ModelRow(name=label, kind=_kind(model)))
        row.name = label
        row.size = weight_bytes(model)
        row.zeros = _zeros(counts.get(model, {}))
        row.samples = {**row.samples, **samples.get(model, {})}  # a run has recorded its own prompts
    for model, text, _, result in texts:
        rows[_key(model)].perplexities[_protocol_of(text, asdict(result))] = result.perplexity
    return list(rows.values())


def _stage_key(run: Run, stage: str) -> Any:
    if stage == "dense":
        return _key(str(run.setting("model", "name_or_path")))
    return _key(str(run.folder)) if is_result(stage) else (run.folder, stage)


def _key(model: str) -> Path | str:
    path = Path(model).expanduser()
    return path.resolve() if path.exists() else model


def _stage_row(label: str, run: Run, stage: str) -> ModelRow:
    start = str(run.setting("model", "name_or_path"))
    place = start if stage == "dense" else str(run.folder) if is_result(stage) else None
    name = _parts(place or start)[-1]
    return ModelRow(
        name=name if place is not None or not label else f"{name}, {label}",
        kind=stage,
        size=None if place is None else weight_bytes(place),
    )


def _protocol_of(text: str, result: Mapping[str, Any]) -> Protocol:
    more: dict[str, Any] = {key: result.get(key) for key in ("stride", "join", "bos")}
    return Protocol(text=text, **more, **{key: result[key] for key in PROTOCOL})


def _completed(run: Run, dataset: str, measured: Mapping[str, Any]) -> Mapping[str, Any]:
    """A result of a stage with what older versions did, and did not write: their texts were joined by blank lines.

    BOS stays unknown if the tokenizer decided it (`data.bos: auto`).
    """
    if "bos" in measured or dataset == "heldout":
        return measured
    place = str(run.setting("data", "bos") or "none")  # the configurations of still older versions have no such key
    known = {"none": "none", "document": "document", "block": "window", "window": "window"}
    return {"join": "blank-line", "bos": known.get(place), **measured}


def _zeros(counts: Counts) -> float | None:
    total = sum(entries for _, entries in counts.values())
    return 1 - sum(kept for kept, _ in counts.values()) / total if total else None


def _kind(model: str) -> str:
    """The kind of model in a folder, as far as its files tell."""
    folder = Path(model).expanduser()
    if not (folder / files.CONFIG_NAME).is_file():
        return "model"
    pattern = SparsityRecord.read(folder).pattern
    quantization = files.read_json(folder / files.CONFIG_NAME).get("quantization_config")
    codec = codec_of(quantization.get("quant_method")) if isinstance(quantization, dict) else None
    if codec is not None:
        bits = "" if codec.value_bits is None else f", {codec.value_bits}-bit values"
        return f"compressed {pattern or codec.pattern}{bits}"
    if pattern is None:
        return "model"
    return f"trained {pattern}" if is_run(folder) else f"checkpoint {pattern}"


def weight_bytes(model: str) -> int | None:
    """Size of the weight files of a local model, including SLoRB's; None for a model on the hub."""
    path = Path(model).expanduser()
    if path.is_file():
        return path.stat().st_size
    try:  # not all files: some models of the hub have their weights a second time, as consolidated.safetensors
        found = files.weight_files(path)
    except UserError:  # no folder, or its weights are pickled
        return None
    return sum(file.stat().st_size for file in (*found, *path.glob(f"{files.ADAPTER_FOLDER}/*.safetensors")))


def layer_counts(model: nn.Module) -> Counts:
    """Weight counts of the linear layers inside the decoder blocks."""
    return {name: _count(weight.detach()) for name, weight in _linear_weights(model).items()}


def _linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of these layers by layer name; those that several layers share are there once."""
    inside = tuple(f"{name}." for name in decoder_blocks(model))
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(inside) and ".lora_" not in name:
            found.setdefault(id(module.weight), (name.removesuffix(".base_layer"), module.weight))
    return dict(found.values())


def _count(weight: Tensor) -> tuple[int, int]:
    return int(weight.count_nonzero()), weight.numel()


def stored_counts(folder: Path, trust_remote_code: bool = False) -> Counts:
    """As `layer_counts`, for a dense checkpoint, which is read one tensor at a time.

    Pruned layers that the model does not have as modules, such as its experts, are counted too.
    """
    from safetensors import safe_open

    from ast_sparse.storage.meta import meta_model

    place = ModelConfig(name_or_path=str(folder), trust_remote_code=trust_remote_code)
    model = meta_model(place, load_model_config(folder, trust_remote_code=trust_remote_code))
    layers = dict.fromkeys([*_linear_weights(model), *SparsityRecord.read(folder).layers])
    found = {}
    for file in files.weight_files(folder):
        with safe_open(file, "pt") as stream:
            for key in {f"{layer}.weight" for layer in layers} & set(stream.keys()):
                found[key.removesuffix(".weight")] = _count(stream.get_tensor(key))
    return {name: found[name] for name in layers if name in found}


def short_names(models: Sequence[str]) -> dict[str, str]:
    """For each model, the shortest end of its path that no other model has."""
    names = {}
    paths = {model: _parts(model) for model in models}
    for model, parts in paths.items():
        for count in range(1, len(parts) + 1):
            short = "/".join(parts[-count:]).replace("//", "/")
            if all(other[-count:] != parts[-count:] for other in paths.values() if other != parts):
                break
        names[model] = short
    return names


def _parts(model: str) -> tuple[str, ...]:
    """The parts of a model's path or hub id; `.` and `..` alone would name nothing."""
    path = Path(model).expanduser()
    return Path(os.path.abspath(path)).parts if path.exists() else Path(model).parts
