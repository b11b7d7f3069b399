"""The files of a model folder that are neither weights nor configuration: tokenizer, templates, code, licence."""

import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ast_sparse.storage import files
from ast_sparse.storage.base_card import README, is_export_card
from ast_sparse.storage.checksums import CHECKSUMS_NAME

GENERATION_NAME = "generation_config.json"

_WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx",
    "*.onnx_data*", "*.ot", "*.npz", "*.tflite", "*.nemo", "*.distcp", "*.index.json", "*.index.*.json",
)  # fmt: skip
# The files on the second line describe packed weights: next to plain ones they would make a reader unpack those again.
_CONFIGS = (
    files.CONFIG_NAME, GENERATION_NAME, files.SPARSITY_CONFIG_NAME, CHECKSUMS_NAME, "config.yaml",
    "quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json",
)  # fmt: skip
# Written by Trainer, its examples, trackers and DeepSpeed.
_TRAINING = (
    "trainer_state.json", "checkpoint-*", "runs", "wandb", "mlruns", "events.out.tfevents*", "all_results.json",
    "train_results.json", "eval_results.json", "trainer_log.jsonl", "global_step*", "latest", "zero_to_fp32.py",
)  # fmt: skip
# What ast-train writes: no other file may take its place.
_RUN_RECORDS = (
    "results.json", "samples.json", "report", "metrics.jsonl", "mask_history.jsonl", "replay", "run.json",
    "data_state.json", "shards.json",
)  # fmt: skip
# The files of a tokenizer, which an earlier model may have left.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
)  # fmt: skip


def companion_files(folder: Path) -> list[Path]:
    """Paths, relative to a model folder, of the files to copy to a folder with other weights of the model.

    Left out are weights of any format and whole subfolders with weights (another format of the model, an adapter),
    configurations, which are written separately, records of a run, the card of an export, which has its numbers, and
    hidden files.

    Raises:
        UserError: one of them is a link to a file outside the folder, which must not be copied.
    """
    skipped = _CONFIGS + _TRAINING + _RUN_RECORDS
    return [
        path.relative_to(folder)
        for top in sorted(folder.iterdir())
        if not _is_hidden(top) and not _matches(top.name, skipped) and not (top.name == README and is_export_card(top))
        for path in _walk(top, ())
    ]


def copy_companions(source: Path, target: Path, wanted: Callable[[Path], bool] = lambda path: True) -> None:
    """Copy the companion files of one model folder into another, replacing those that an earlier run left there.

    Args:
        wanted: whether to copy a path, given relative to `source`.
    """
    for path in filter(wanted, companion_files(source)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)


def remove_tokenizer(folder: Path) -> None:
    """Remove the tokenizer and chat templates of an earlier model, which would be taken for those of the next one."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and is_chat_template(Path(path.name)):
            shutil.rmtree(path)
        elif path.name in _TOKENIZER or is_chat_template(Path(path.name)):
            path.unlink()


def is_chat_template(path: Path) -> bool:
    """Whether a companion is a chat template, or one of several."""
    return _matches(path.parts[0], ("*chat_template*",))


def is_tokenizer_file(path: Path) -> bool:
    """Whether a companion belongs to the tokenizer."""
    return _matches(path.parts[0], files.TOKENIZER_FILES + files.COMPANION_FILES + ("vocab*", "tekken*"))


def _walk(path: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The files at or below a path; none of a folder that holds weights."""
    if path.is_file():
        if not _matches(path.name, _WEIGHTS):
            files.check_inside(path)
            yield path
    elif path.is_dir() and path.resolve() not in above:
        entries = [entry for entry in sorted(path.iterdir()) if not _is_hidden(entry)]
        if any(entry.is_file() and _matches(entry.name, _WEIGHTS) for entry in entries):
            return
        files.check_inside(path)
        for entry in entries:
            yield from _walk(entry, (*above, path.resolve()))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name == "__pycache__"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
