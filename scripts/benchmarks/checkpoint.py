"""What does it cost to write and read a compressed checkpoint, compared with safetensors of the dense weights?

Ours: encode from the mask, `save_file`, read back, check the metadata, decode and compare with the masked weight; and
`load_file`, check and decode. Alternative: `save_file` of the masked bfloat16 weights, and `load_file` with each tensor
copied, since it maps the file without reading it. Layers with the shapes of a 7B model, files in one temporary folder,
cached or not by the system. Checksums, which an export also writes, are not included. Interleaved pairs.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ast_sparse.kernels.code24 import check_meta, pack24, same_bits, unpack24
from ast_sparse.sparsity.masks import nm_mask
from scripts.benchmarks.harness import Result, Settings, interleave, main

GOAL = 1.5
SHAPES = {"q_proj": (4096, 4096), "o_proj": (4096, 4096), "up_proj": (11008, 4096)}
META = "_meta"


def write_code(weights: dict[str, Tensor], masks: dict[str, Tensor], file: Path) -> None:
    coded: dict[str, Tensor] = {}
    for name, weight in weights.items():
        coded[name], coded[name + META] = pack24(weight, masks[name])
    save_file(coded, file)
    for name, dense in read_code(file).items():
        if not same_bits(dense, weights[name]):
            raise ValueError(f"{name} differs.")


def read_code(file: Path) -> dict[str, Tensor]:
    coded = load_file(file)
    dense = {}
    for name, values in coded.items():
        if not name.endswith(META):
            if not check_meta(coded[name + META]):
                raise ValueError(f"{name} is damaged.")
            dense[name] = unpack24(values, coded[name + META])
    return dense


def read_dense(file: Path) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in load_file(file).items()}


def measure(settings: Settings) -> Iterator[Result]:
    shapes = {"layer": (64, 128)} if settings.quick else SHAPES
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    masks = {name: nm_mask(weight.abs()) for name, weight in weights.items()}
    weights = {name: torch.where(masks[name], weight, 0).bfloat16() for name, weight in weights.items()}
    case = " + ".join(f"{rows}x{columns}" for rows, columns in shapes.values())
    with tempfile.TemporaryDirectory() as folder:
        code, dense = Path(folder) / "code.safetensors", Path(folder) / "dense.safetensors"
        write = {"ours": lambda: write_code(weights, masks, code), "dense": lambda: save_file(weights, dense)}
        read = {"ours": lambda: read_code(code), "dense": lambda: read_dense(dense)}
        cases = {"encode, write, verify": (write, "save_file"), "load, decode": (read, "load_file, copied")}
        for what, (sides, against) in cases.items():
            times = interleave(sides, settings.pairs(20), warmup=1)
            about = dict(question="checkpoint", against=f"{against}, dense", goal=GOAL)
            yield Result.of(times["ours"], times["dense"], case=f"{what}: {case}", **about)


if __name__ == "__main__":
    main(measure)
