"""How much memory do the ranks of a sharded run hold together while they load a model and its teacher?

A LLaMA of random bfloat16 weights is written to safetensors. N gloo ranks (FSDP2, bfloat16) load it by name as
`SparseTrainer` does, with its dense self as teacher, and go on to the first loss. Alternative: the same ranks with the
package of another commit, in a git worktree, with a smaller model if it would not fit into `--memory`.

Memory is the sum over the ranks of `/proc/PID/smaps_rollup`, every 20 ms: proportional set size (PSS; shared pages
count once) and resident set size (RSS; they count in each rank). What the ranks have after a warm-up with one block
(imports, compiled code, torch itself) is printed, and subtracted from the other figures. glibc returns freed blocks at
once, so that what is counted is in use. Student, masks and teacher would be on GPUs: what the host needs while loading
is about the peak without these tensors, as they are at the end. One run of each side.
"""

import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
NEED = 10  # bytes a parameter of all ranks together: float32 and masks of the student, the teacher, gathered weights
BEFORE = 12  # bytes a parameter in each rank of the commit before: float32, its copy for the teacher, and a sharded one
OTHER = 2**29  # bytes of each rank besides: imports, torch
TOKENS, VOCAB, FEW = 64, 32000, 64
SIZES = ("pss", "rss")


def llama(parameters: float) -> Any:
    """The configuration of a LLaMA with about so many parameters."""
    from transformers import LlamaConfig

    hidden, inner, heads = (2048, 5632, 32) if parameters > 5e8 else (512, 1408, 8)
    block = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    blocks = max(1, round((parameters - 2 * VOCAB * hidden) / block))
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=TOKENS,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


def smallest(config: Any) -> Any:
    """The configuration of a model with one block of the same shapes, and few tokens."""
    config = copy.deepcopy(config)
    config.update({"num_hidden_layers": 1, "vocab_size": FEW})
    return config


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
        groups.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else name, []).append(name)
    where: dict[str, str] = {}
    for number, names in enumerate(groups.values(), start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


# ---- a rank ----------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """The first loss is there."""


# long: most of it is the trainer that stops twice, and its arguments
def rank(model: str, out: Path) -> None:
    """Load, and compute a loss; says in files when, and the bytes of the tensors that a GPU would hold."""
    from datasets import Dataset
    from transformers import LlamaConfig, TrainingArguments

    import ast_sparse

    number, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    said: dict[str, Any] = {"pid": os.getpid(), "package": ast_sparse.__file__}

    def say(what: str) -> None:
        said[what] = time.time()
        written = out / f"{number}.writing"
        written.write_text(json.dumps(said))
        written.rename(out / f"{number}.{what}")

    class Trainer(ast_sparse.SparseTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            said["held"] = held_bytes(self.student, self.teacher)
            say("loaded")
            wait_for(out / "on")
            super().compute_loss(*args, **kwargs)
            say("loss")
            raise Enough

    sharded: Any = True
    args = TrainingArguments(
        str(out / "run"), max_steps=1, use_cpu=True, bf16=True, fsdp=sharded, report_to="none", disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=1, logging_strategy="no",
    )  # fmt: skip

    def load_and_run(name: str, vocabulary: int) -> None:
        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(1, vocabulary, (world, TOKENS), generator=drawn).tolist()
        trainer = Trainer(
            name,
            args,
            sparsity_config=ast_sparse.SparsityConfig(),
            distillation_config=ast_sparse.DistillationConfig(),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        )
        with suppress(Enough):
            trainer.train()

    warm = out / f"warm-{number}"
    write_model(warm, smallest(LlamaConfig.from_pretrained(model)))
    load_and_run(str(warm), FEW)  # what is imported and compiled on the way is not measured
    gc.collect()
    said.clear()
    said |= {"pid": os.getpid(), "package": ast_sparse.__file__}
    torch.distributed.barrier()
    say("ready")
    wait_for(out / "go")
    load_and_run(model, VOCAB)
    wait_for(out / "end")
    torch.distributed.destroy_process_group()


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


def held_bytes(student: Any, teacher: Any) -> dict[str, int]:
    """Bytes of the parameters of this process, buffers included: student, its masks, teacher."""
    held = dict.fromkeys(("student", "masks", "teacher"), 0)
    for owner, model in (("student", student), ("teacher", teacher)):
        tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        for tensor in tensors.values():
            piece = getattr(tensor, "_local_tensor", tensor)
            kind = "masks" if not piece.is_floating_point() and owner == "student" else owner
            held[kind] += piece.numel() * piece.element_size()
    return held


# ---- the sum over all ranks ------------------------------------------------------------------------------------------


def resident(pids: list[int]) -> dict[str, int]:
    """Bytes of all processes together; one that has ended has none."""
    found = dict.fromkeys(SIZES, 0)
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                key = line.split(":")[0].lower()
                if key in found:
                    found[key] += 1024 * int(line.split()[1])
    return found


class Ranks:
    """The ranks of one side, and the peaks of what they have together."""

    def __init__(self, package: Path, model: Path, ranks: int, out: Path) -> None:
        self.count, self.out = ranks, out
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *launch, str(Path(__file__).resolve()), "--rank", str(model), str(out)]
        freed = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17), "MALLOC_ARENA_MAX": "1"}
        environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", **freed}
        with (out / "log").open("w") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=package, stdout=log, stderr=log)

    def said(self, what: str) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in self.out.glob(f"*.{what}")]

    def until(self, what: str, pids: list[int] | None = None) -> dict[str, int]:
        """Wait until all ranks have said something; returns the peaks of the waiting."""
        click.echo(f"  {what} ...", err=True)
        peak = dict.fromkeys(SIZES, 0)
        while len(list(self.out.glob(f"*.{what}"))) < self.count:
            if self.process.poll() is not None:
                raise click.ClickException(f"A rank ended early: {(self.out / 'log').read_text()[-2000:]}")
            now = resident(pids or [])
            peak = {size: max(peak[size], now[size]) for size in SIZES}
            time.sleep(0.02)
        return peak


def measure_side(package: Path, model: Path, ranks: int) -> dict[str, Any]:
    """Bytes of all ranks together: before loading; loading at its peak and after it; the peak of the first loss."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "on").touch()  # the warm-up does not wait
        side = Ranks(package, model, ranks, out)
        side.until("ready")
        for file in (out / "on", *out.glob("*.loaded"), *out.glob("*.loss")):
            file.unlink()
        pids = [said["pid"] for said in side.said("ready")]
        before = resident(pids)
        begun = time.time()
        (out / "go").touch()
        loading = side.until("loaded", pids)
        loaded = resident(pids)
        waited = time.time()
        (out / "on").touch()
        waited -= max(said["loaded"] for said in side.said("loaded"))
        loss = side.until("loss", pids)
        (out / "end").touch()
        side.process.wait()
        ends = side.said("loss")
        if any(not str(end["package"]).startswith(str(package)) for end in ends):
            raise click.ClickException(f"The ranks used {ends[0]['package']}, not {package}.")
        held = {kind: sum(end["held"][kind] for end in ends) for kind in ends[0]["held"]}
        seconds = max(end["loss"] for end in ends) - begun - waited
        return {
            "before": before, "loading": loading, "loaded": loaded, "loss": loss, "held": held, "seconds": seconds,
        }  # fmt: skip


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


# ---- the table -------------------------------------------------------------------------------------------------------


def figures(count: int, found: dict[str, Any]) -> dict[str, str]:
    """The rows of the table for one side."""
    file, held = 2 * count, sum(found["held"].values())

    def shown(bytes_: float) -> str:
        return f"{bytes_ / 1e6:>9,.0f} MB {bytes_ / count:6.2f} {bytes_ / file:6.2f}"

    rows = {"the file": shown(file), "imports, subtracted below: PSS": shown(found["before"]["pss"])}
    rows["imports, subtracted below: RSS"] = shown(found["before"]["rss"])
    rows |= {f"tensors: {kind}": shown(bytes_) for kind, bytes_ in found["held"].items()}
    for size in SIZES:
        for phase, name in (("loading", "peak of loading"), ("loaded", "loaded"), ("loss", "peak of the first loss")):
            rows[f"{name}: {size.upper()}"] = shown(found[phase][size] - found["before"][size])
    rows["peak of loading without the tensors: PSS"] = shown(found["loading"]["pss"] - found["before"]["pss"] - held)
    return {**rows, "first loss after": f"{found['seconds']:>9,.1f} s"}


def run(parameters: float, ranks: int, against: str | None, memory: float) -> None:
    """Measure and print the table."""
    from ast_sparse.tables import format_table

    limit = memory * 2**30 - ranks * OTHER
    if NEED * parameters > limit:
        need = (NEED * parameters + ranks * OTHER) / 2**30
        raise click.ClickException(f"This needs about {need:.1f} GiB. Raise --memory, or lower --parameters.")
    sides: dict[str, tuple[int, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "ours"
        click.echo("this one:\n  writing the model ...", err=True)
        count = write_model(model, llama(parameters))
        sides["this one"] = count, measure_side(ROOT, model, ranks)
        if against is not None:
            click.echo(f"{against}:", err=True)
            size = min(parameters, limit / (BEFORE * ranks))
            if size < parameters:
                model = Path(folder) / "smaller"
                click.echo("  writing a smaller model ...", err=True)
                count = write_model(model, llama(size))
            with worktree(against) as package:
                sides[against] = count, measure_side(package, model, ranks)
    rows = {side: figures(*found) for side, found in sides.items()}
    headers = ["", *(f"{side}, {count / 1e6:,.0f} M parameters" for side, (count, _) in sides.items())]
    click.echo(f"{ranks} gloo ranks together: bytes, bytes a parameter, and share of the bfloat16 file")
    click.echo(format_table(headers, [[name, *(each[name] for each in rows.values())] for name in rows["this one"]]))
    if against is not None:
        peaks = [(found["loading"]["pss"] - found["before"]["pss"]) / count for count, found in sides.values()]
        click.echo(f"Peak of loading a parameter, this one / {against}: {peaks[0] / peaks[1]:.3f}")


@click.command(help=__doc__)
@click.option("--parameters", default="1.1b", show_default=True, help="About how many: 150m, 1.1b.")
@click.option("--ranks", default=4, show_default=True)
@click.option("--against", help="The commit to compare with.")
@click.option("--memory", default=17.0, show_default=True, help="GiB that a side may use, about.")
@click.option("--rank", "as_rank", nargs=2, hidden=True)
def main(parameters: str, ranks: int, against: str | None, memory: float, as_rank: tuple[str, str] | None) -> None:
    if as_rank:
        rank(as_rank[0], Path(as_rank[1]))
        return
    run(float(parameters[:-1]) * {"m": 1e6, "b": 1e9}[parameters[-1].lower()], ranks, against, memory)


if __name__ == "__main__":
    main()
