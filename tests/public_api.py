"""What users rely on, as lines of text: names, flags, YAML keys, and the names and contents of the files of a run.

`public_api.txt` is the list, and `test_public_api.py` compares. After an intended change, write it again and check the
difference with git:

    python -m tests.public_api > tests/public_api.txt

In a checkout of another commit, with this file copied into its `tests/`, the command prints the list of that commit.
"""

import ast
import dataclasses
import inspect
import json
import re
import tempfile
import tomllib
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
from click.testing import CliRunner
from safetensors import safe_open

import ast_sparse
from ast_sparse.config import SECTIONS, MixtureConfig
from ast_sparse.config.data import DomainConfig
from ast_sparse.speed.side import InProcess
from tests.models import generated_text, save_tiny_model

ROOT = Path(ast_sparse.__file__).parents[1]
# Constants that a small run in one process does not show.
CONSTANTS = (
    "MODEL_FOLDER", "OPTIMIZER_FOLDER", "SUMS_NAME", "PROGRESS", "REPLAY", "PAGE", "USER_ERROR_EXIT", "INTERRUPT_EXIT",
    "PREEMPTED_EXIT", "DATA_STATE",
)  # fmt: skip
_SHOWN_VALUES = ("format_version", "quant_method", "format", "algorithm", "peft_type")
_RUN = """
model: {{name_or_path: {folder}/model}}
data: {{train: {folder}/text.txt, block_size: 32, eval_share: 0.1}}
sparsity: {{mask_interval: 1}}
slorb: {{k: 8}}
training: {{max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1, save_steps: 1, use_cpu: true}}
evaluation: {{datasets: [{folder}/text.txt], seq_len: 32, windows: 2}}
"""


def api_lines() -> list[str]:
    """The whole list, one fact per line."""
    with tempfile.TemporaryDirectory() as folder:
        sections = {
            "names": names(), "flags": flags(), "keys": keys(), "constants": constants(), "files": files(Path(folder)),
        }  # fmt: skip
        return [line for title, lines in sections.items() for line in (f"[{title}]", *sorted(set(lines)))]


def names() -> Iterator[str]:
    """Public names with parameters and defaults; classes with what they add to bases from other packages."""
    for name in ast_sparse.__all__:
        value = getattr(ast_sparse, name)
        yield f"{name}{_signature(value)}"
        if inspect.isclass(value):
            yield from (f"{name}.{line}" for line in _members(value))


def _signature(value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, Exception) and "__init__" not in vars(value):
        return "(*args)"  # like every exception
    signature = inspect.signature(value)
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _members(cls: type) -> Iterator[str]:
    foreign = [base for base in cls.__mro__ if not base.__module__.startswith("ast_sparse")]
    fields = {item.name for item in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for name in dir(cls):
        if name.startswith("_") or name in fields or any(name in vars(base) for base in foreign):
            continue
        value = inspect.getattr_static(cls, name)
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        yield f"{name}{_signature(function)}" if inspect.isfunction(function) else name


def flags() -> Iterator[str]:
    """Options and arguments of the commands, with what they take and their defaults."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for script, place in scripts.items():
        module, _, function = place.partition(":")
        yield from _flags(script, getattr(import_module(module), function))


def _flags(name: str, command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        for below, each in command.commands.items():
            yield from _flags(f"{name} {below}", each)
        return
    for parameter in command.params:
        known = parameter.to_info_dict()
        kind = known["type"]
        taken = "|".join(kind["choices"]) if "choices" in kind else kind["name"]
        limits = "".join(f" {key}={kind[key]}" for key in ("min", "max") if kind.get(key) is not None)
        marks = "".join(f" {key}" for key in ("required", "multiple", "is_flag") if known.get(key))
        values = {key: known.get(key) for key in ("default", "flag_value")}
        shown = "".join(f" {key}={value!r}" for key, value in values.items() if _is_plain(value))
        yield f"{name} {' '.join((*known['opts'], *known['secondary_opts']))}: {taken}{limits}{marks}{shown}"


def _is_plain(value: Any) -> bool:
    """Whether there is a default, rather than click's marker for none."""
    return isinstance(value, bool | int | float | str | tuple)


def keys() -> Iterator[str]:
    """YAML keys with type and default."""
    for section, cls in {**SECTIONS, "data.domains.NAME": DomainConfig, "data.update": MixtureConfig}.items():
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            default = "" if item.default is dataclasses.MISSING else f" = {item.default!r}"
            hint = hints[item.name]
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            yield f"{section}.{item.name}: {kind}{default}"


def constants() -> Iterator[str]:
    """`CONSTANTS` by name, wherever they are defined."""
    for path in (ROOT / "ast_sparse").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name in CONSTANTS:
                    yield f"{name} = {ast.literal_eval(node.value)!r}"


def files(folder: Path) -> Iterator[str]:
    """The parts of a run, a checkpoint, the exports and shards: files, JSON keys, tensors of a sparse layer."""
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(generated_text(300), encoding="utf-8")
    (folder / "run.yaml").write_text(_RUN.format(folder=folder), encoding="utf-8")
    _call("train", "--config", folder / "run.yaml", "--output-dir", folder / "run")
    for kind in ("dense", "compressed"):
        _call("export", folder / "run" / "checkpoint-2", folder / kind, "--format", kind)
    _call("data", "prepare", folder / "shards", folder / "text.txt", "--tokenizer", folder / "model", "--workers", 1)
    (folder / "eval").mkdir()
    text = ("--dataset", folder / "text.txt", "--seq-len", 32, "--limit", 2)
    _call("eval", folder / "run", *text, "--json", folder / "eval" / "results.json")
    (folder / "bench").mkdir()
    short = ("--lengths", "8/4", "--batch", 1, "--repeats", 1)
    with patch("ast_sparse.speed.turns.Process", InProcess):
        _call("bench", folder / "compressed", *short, "--json", folder / "bench" / "speed.json")
    for made in ("run", "dense", "compressed", "shards", "eval", "bench"):
        for path in (folder / made).rglob("*"):
            if path.is_file() and not path.is_relative_to(folder / "run" / "checkpoint-1"):
                place = re.sub(r"\d+", "N", str(path.relative_to(folder)))
                yield from (f"{place}{line}" for line in _contents(path))


def _call(command: str, *arguments: object) -> None:
    main = import_module(f"ast_sparse.cli.{command}").main
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def _contents(path: Path) -> Iterator[str]:
    """What a file holds, after its name; nothing for files that other libraries define."""
    yield ""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                if "q_proj" in name:
                    tensor = file.get_slice(name)
                    yield f": {_plain(name)} {tensor.get_dtype()} {len(tensor.get_shape())}d"
    elif path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            yield from (f": {each}" for each in _keys(json.loads(line)))
    elif path.suffix == ".json" and not path.name.startswith("tokenizer") and path.name != "generation_config.json":
        value = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "config.json":
            value = value.get("quantization_config", {})
        elif path.name == "trainer_state.json":
            value = {name: each for name, each in value["stateful_callbacks"].items() if name != "TrainerControl"}
        elif path.name == "adapter_config.json":
            value = {key: value[key] for key in ("peft_type", "rank_pattern", "alpha_pattern")}
        yield from (f": {each}" for each in _keys(value))


def _keys(value: Any, above: str = "") -> Iterator[str]:
    """The keys of a JSON value and of mappings inside it, except settings that it repeats, which `keys` lists."""
    if isinstance(value, list):
        for each in value:
            yield from _keys(each, f"{above}[]")
    elif isinstance(value, dict):
        for key, below in value.items():
            name = f"{above}.{'NAME' if '.' in key or '/' in key else _plain(key)}".lstrip(".")
            yield f"{name} = {below!r}" if key in _SHOWN_VALUES else name
            if key not in (*SECTIONS, "training") and not key.endswith("_config"):
                yield from _keys(below, name)


def _plain(name: str) -> str:
    return re.sub(r"(?<=[._])\d+(?=[._]|$)", "N", name)


if __name__ == "__main__":
    print("\n".join(api_lines()))
