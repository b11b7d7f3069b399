"""Where a step of `whole_step` spends its time: the most expensive operations of each side, by torch.profiler.

`python scripts/benchmarks/step_profile.py [gpt2|smollm2|tiny] [--rows 12]`. It is not a benchmark, because profiling
itself takes time; `run.py` leaves it out.
"""

import sys
from collections.abc import Callable

import click
import torch
from torch.profiler import ProfilerActivity, profile

from scripts.benchmarks.harness import Command
from scripts.benchmarks.whole_step import new_model, ours, plain

SIDES: dict[str, Callable[..., list[float]]] = {
    "ours": lambda model, ids, seen: ours(model, ids, around=seen),
    "plain loop": lambda model, ids, seen: plain(model, ids, has_loss=True, around=seen),
}


@click.command(cls=Command, help=__doc__)
@click.argument("name", default="gpt2", type=click.Choice(["gpt2", "smollm2", "tiny"]))
@click.option("--rows", default=12, type=click.IntRange(min=1), help="Operations to show for each side.")
def main(name: str, rows: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (2, 16) if name == "tiny" else (8, 256)
    on_gpu = device.type == "cuda"
    for side, run in SIDES.items():
        model = new_model(name)
        ids = torch.randint(0, model.config.vocab_size, (2, *shape), device=device)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        seen = profile(activities=activities)
        run(model, ids, seen)
        del model
        events = seen.key_averages()
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        total = sum(getattr(event, key) for event in events) or 1
        click.echo(f"{side}, {name}, 2 steps of {shape[0]} x {shape[1]}: {total / 1e6:.1f} s in operations")
        for event in sorted(events, key=lambda event: -getattr(event, key))[:rows]:
            seconds = getattr(event, key) / 1e6
            click.echo(f"  {seconds:7.2f} s {seconds * 1e6 / total:6.1%} {event.count:7d} x {event.key}")


if __name__ == "__main__":
    sys.exit(main())
