"""How much memory do the ranks of a sharded run hold together while they load a model and its teacher?

A LLaMA of random bfloat16 weights is written to safetensors. N gloo ranks (FSDP2, bfloat16) load it by name as
`SparseTrainer` does, with its dense self as teacher, and take one step. Every 50 ms the proportional set sizes of the
ranks (`/proc/PID/smaps_rollup`; shared pages count once) are added up. Alternative: the same ranks with the package of
another commit, in a git worktree. If that would not fit into the free memory, it is measured with fewer blocks, and the
ratio is that of bytes a parameter. What ranks hold before they load (imports) is left out. One run of each side.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
BEFORE_BYTES = 12  # a parameter and rank of the commit before: float32, its copy for the teacher, and moments of a step
TOKENS, VOCAB = 64, 32000


def llama(parameters: float, hidden: int = 512) -> Any:
    """The configuration of a LLaMA with about so many parameters."""
    from transformers import LlamaConfig

    hidden, inner, heads = (2048, 5632, 32) if parameters > 5e8 else (hidden, hidden * 11 // 4, 8)
    block = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    blocks = max(1, round((parameters - 2 * VOCAB * hidden) / block))
    return LlamaConfig(
        vocab_size=VOCAB if parameters else 64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=TOKENS,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


def write_model(folder: Path, config: Any) -> int:
    """Write random weights file by file, never the whole model in memory; returns the number of parameters."""
    from transformers import LlamaForCausalLM

    folder.mkdir()
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).named_parameters()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(name)
    where: dict[str, str] = {}
    for number, names in enumerate(groups.values(), start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


# ---- a rank ----------------------------------------------------------------------------------------------------------


def rank(model: str, out: Path) -> None:
    """Load and take a step; writes when, and the bytes of the tensors that a GPU would hold."""
    from datasets import Dataset
    from transformers import TrainerCallback, TrainingArguments

    import ast_sparse

    class First(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            said["step"] = time.time()

    number, world = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    sharded: Any = True
    args = TrainingArguments(
        str(out / "run"), max_steps=1, use_cpu=True, bf16=True, fsdp=sharded, report_to="none", disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=1, logging_strategy="no",
    )  # fmt: skip
    ids = torch.randint(0, VOCAB, (world, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()

    def load(name: str) -> Any:
        return ast_sparse.SparseTrainer(
            name,
            args,
            sparsity_config=ast_sparse.SparsityConfig(),
            distillation_config=ast_sparse.DistillationConfig(),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        )

    said: dict[str, Any] = {"pid": os.getpid(), "package": ast_sparse.__file__}
    tiny = str(out / f"tiny-{os.environ['RANK']}")
    write_model(Path(tiny), llama(0, hidden=64))
    load(tiny)  # what is imported on the way is not measured
    torch.distributed.barrier()
    (out / f"{number}.started").write_text(json.dumps(said))
    while not (out / "go").exists():
        time.sleep(0.01)
    run = load(model)
    said |= {"loaded": time.time(), "held": held_bytes(run.student) + held_bytes(run.teacher)}
    (out / f"{number}.loaded").write_text(json.dumps(said))
    torch.distributed.barrier()
    time.sleep(0.5)  # is sampled
    run.add_callback(First())
    run.train()
    (out / f"{number}.done").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


def held_bytes(model: Any) -> int:
    """Bytes of the parameters and buffers of this process."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    pieces = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors.values())
    return sum(piece.numel() * piece.element_size() for piece in pieces)


# ---- the sum over all ranks ------------------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """Bytes of a process, shared pages in proportion; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def measure_side(package: Path, model: Path, ranks: int) -> dict[str, float]:
    """Bytes of all ranks together above those of the imports: the peak of loading, after it, the peak of the step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *launch, str(Path(__file__).resolve()), "--rank", str(model), str(out)]
        environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        with (out / "log").open("w") as log:
            process = subprocess.Popen(command, env=environment, cwd=package, stdout=log, stderr=log)
            while len(list(out.glob("*.started"))) < ranks and process.poll() is None:
                time.sleep(0.1)
            time.sleep(0.5)
            pids = [json.loads(file.read_text())["pid"] for file in out.glob("*.started")]
            before = sum(map(resident, pids))
            (out / "go").touch()
            begun, loaded, peaks, after = time.time(), False, [0, 0], 0
            while process.poll() is None:
                loaded = loaded or len(list(out.glob("*.loaded"))) == ranks
                now = sum(map(resident, pids)) - before
                after = now if loaded and not after else after
                peaks[loaded] = max(peaks[loaded], now)
                time.sleep(0.05)
        ends = [json.loads(file.read_text()) for file in out.glob("*.done")]
        if len(ends) < ranks:
            raise click.ClickException(f"The ranks of {package} failed: {(out / 'log').read_text()[-2000:]}")
        if any(not str(end["package"]).startswith(str(package)) for end in ends):
            raise click.ClickException(f"The ranks used {ends[0]['package']}, not {package}.")
        held = sum(end["held"] for end in ends)
        seconds = max(end["step"] for end in ends) - begun
        return {"peak": peaks[0], "after": after, "step": peaks[1], "held": held, "seconds": seconds}


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(path), commit], check=True, capture_output=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True, capture_output=True)


def fitting(parameters: float, ranks: int) -> float:
    """As many parameters as the commit before can load in 80% of the free memory, at most the given number."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min(parameters, 0.8 * free / (BEFORE_BYTES * ranks))


def row(side: str, parameters: int, found: dict[str, float]) -> list[str]:
    """The cells of a side: bytes of the peak and after it, what a GPU would hold, the rest beside the file, seconds."""
    file = 2 * parameters
    host = max(0.0, found["peak"] - found["held"])
    values = [f"{found[key] / 1e6:,.0f} MB" for key in ("peak", "after", "step", "held")]
    shares = [f"{found['peak'] / parameters:.2f}", f"{found['peak'] / file:.2f}", f"{host / file:.2f}"]
    return [side, f"{parameters / 1e6:,.0f} M", *values, *shares, f"{found['seconds']:.1f} s"]


def run(parameters: float, ranks: int, against: str | None) -> None:
    """Measure and print the table."""
    from ast_sparse.tables import format_table

    headers = ["package", "parameters", "peak of loading", "loaded", "peak of a step", "tensors", "peak / parameter"]
    headers += ["peak / file", "(peak - tensors) / file", "first step after"]
    rows, per_parameter = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "ours"
        count = write_model(model, llama(parameters))
        ours = measure_side(ROOT, model, ranks)
        rows.append(row("this one", count, ours))
        per_parameter.append(ours["peak"] / count)
        if against is not None:
            size = fitting(parameters, ranks)
            smaller = model
            if size < parameters:
                smaller = Path(folder) / "smaller"
                count = write_model(smaller, llama(size))
            with worktree(against) as package:
                found = measure_side(package, smaller, ranks)
            rows.append(row(against, count, found))
            per_parameter.append(found["peak"] / count)
    click.echo(f"{ranks} gloo ranks, bytes of all together above those of imports; the file has 2 bytes a parameter")
    click.echo(format_table(headers, rows))
    if len(per_parameter) == 2:
        click.echo(f"Peak a parameter, this one / {against}: {per_parameter[0] / per_parameter[1]:.3f}")


@click.command(help=__doc__)
@click.option("--parameters", default="1.1b", show_default=True, help="About how many: 150m, 1.1b.")
@click.option("--ranks", default=4, show_default=True)
@click.option("--against", help="The commit to compare with.")
@click.option("--rank", "as_rank", nargs=2, hidden=True)
def main(parameters: str, ranks: int, against: str | None, as_rank: tuple[str, str] | None) -> None:
    if as_rank:
        rank(as_rank[0], Path(as_rank[1]))
        return
    run(float(parameters[:-1]) * {"m": 1e6, "b": 1e9}[parameters[-1].lower()], ranks, against)


if __name__ == "__main__":
    main()
