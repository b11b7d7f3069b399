"""A run of ast-train that succeeds, what it reads, and a check that one wrong thing in it is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ast_sparse.cli.train import main
from tests.models import generated_text, save_tiny_model, tiny_config, tiny_tokenizer

CHECKPOINT_FILES = (
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sparsity_config.json", "trainer_state.json"
)  # fmt: skip


def base(root: Path) -> dict[str, Any]:
    """A run of two steps that succeeds."""
    return {
        "model": {"name_or_path": str(root / "llama")},
        "data": {"root": str(root), "train": "text.txt", "eval_share": 0.1, "block_size": 16},
        "sparsity": {"mask_interval": 2},
        "distillation": {"alpha": 0.5},
        "slorb": {"k": 16},
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "report_to": "none",
            "use_cpu": True, "save_steps": 1, "disable_tqdm": True,
        },
        "evaluation": {"datasets": ["heldout", "other.txt"], "seq_len": 16, "windows": 2},
    }  # fmt: skip


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN_MODELS: dict[str, Callable[[Path], None]] = {
    "cut-weights": lambda folder: cut(folder / "model.safetensors"),
    "no-weights": lambda folder: (folder / "model.safetensors").unlink(),
    "nan-weights": poison,
    "cut-config": lambda folder: cut(folder / "config.json"),
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "list-config": lambda folder: (folder / "config.json").write_text("[]"),
    "no-size": edit_config(hidden_size=0),
    "negative-size": edit_config(hidden_size=-32),
    "absurd-size": edit_config(hidden_size=10**15),
    "text-size": edit_config(hidden_size="big"),
    "unknown-type": edit_config(model_type="lama"),
    "no-tokenizer": lambda folder: [file.unlink() for file in folder.glob("token*")] and None,  # type: ignore[func-returns-value]
    "cut-tokenizer": lambda folder: cut(folder / "tokenizer.json"),
}


def write_texts(root: Path) -> None:
    (root / "text.txt").write_text(generated_text(100))
    (root / "other.txt").write_text(generated_text(40, seed=1))
    (root / "short.txt").write_text("two of four")
    (root / "empty.txt").write_text("")
    (root / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (root / "zeros.txt").write_bytes(b"\0\1\2" * 500)
    (root / "table.csv").write_text("a,b\n")
    (root / "list.jsonl").write_text('{"text": "x"}\n[1]\n')
    (root / "field.jsonl").write_text('{"text": "x"}\n{"body": "x"}\n')
    (root / "cut.jsonl").write_text('{"text": "x"}\n{"text": "x"\n')
    (root / "number.jsonl").write_text('{"text": 5}\n')
    (root / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n' * 2)
    (root / "cut-chat.jsonl").write_text('{"prompt": "x", "completion": "y"}\n{"prompt": "x"}\n')
    (root / "fake.parquet").write_text("hello")
    (root / "fake.gguf").write_text("hello")
    (root / "bytes.yaml").write_bytes(b"model: \xff\xfe")


def make_inputs(root: Path) -> Path:
    """Make everything the runs read: texts, intact and broken models, a finished run, damaged checkpoints."""
    write_texts(root)
    save_tiny_model(root / "llama")
    other = tiny_config("llama")
    other.vocab_size = 64
    AutoModelForCausalLM.from_config(other).save_pretrained(root / "small-vocabulary")
    tiny_tokenizer().save_pretrained(root / "small-vocabulary")
    for name, damage in BROKEN_MODELS.items():
        damage(Path(shutil.copytree(root / "llama", root / name)))
    result = train(root, base(root), "--output-dir", root / "finished")
    assert result.exit_code == 0, result.output  # so every failure below is due to its one change
    for name in CHECKPOINT_FILES:
        cut(Path(shutil.copytree(root / "finished/checkpoint-2", root / f"damaged-{name}")) / name)
    return root


def train(root: Path, tree: dict[str, Any] | str, *arguments: str | Path) -> Result:
    config = root / "run.yaml"
    config.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return CliRunner().invoke(main, ["--config", str(config), *map(str, arguments)])


def files(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.name != "run.yaml"}


def refused(root: Path, message: str, tree: dict[str, Any] | str, *arguments: str | Path) -> None:
    """One line, exit code 2, and no file that was not there before."""
    before = files(root)
    result = train(root, tree, *arguments)
    assert isinstance(result.exception, SystemExit), result.exc_info
    lines = [line for line in re.split(r"[\r\n]+", result.stderr) if line and not is_bar(line)]
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("Error: "), result.output
    assert re.search(message, lines[0]), lines[0]
    after = files(root)
    after.pop(str(root), None), before.pop(str(root), None)  # its time changes with run.yaml
    assert after == before


def is_bar(line: str) -> bool:
    return "it/s]" in line or "examples/s]" in line


def name_of(case: Any) -> str | None:
    return case if isinstance(case, str) and "\\" not in case else "+".join(case) if isinstance(case, list) else ""
