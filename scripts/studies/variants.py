"""A study: its file, its variants with their resolved settings, and the commands that make them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ast_sparse.config import BasisConfig, RunConfig, SLoRBConfig, load_config
from ast_sparse.config.yaml12 import parse_yaml
from ast_sparse.errors import UserError, kind_of
from ast_sparse.run.checks import slorb_of
from ast_sparse.run.stages import HELDOUT, WIKITEXT2
from ast_sparse.sparsity.oneshot import METHODS

KEYS = ("title", "config", "set", "smoke", "seeds", "variants", "figures")
KINDS = ("train", "prune", "eval")
FIGURES = ("perplexity", "flips", "losses", "alpha", "curves")
_RESERVED = ("provenance",)  # its record would have the same name as a file of the study


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table: a run of `kind` train, prune or eval, and its settings.

    Variants that differ only in `seed`, one of the study's `seeds`, have the same name.
    """

    name: str
    kind: str
    model: str | None  # what `run: eval` measures, if it is not the base model
    settings: dict[str, Any]
    config: RunConfig
    seed: int | None = None  # None: the seeds of its settings

    @property
    def label(self) -> str:
        """Its name, and its seed if it has one."""
        return _label(self.name, self.seed)

    @property
    def folder(self) -> str:
        """Its folder inside OUT."""
        return _folder(self.label)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Texts that its perplexity is measured on; only a training run has held-out text."""
        names = self.config.evaluation.datasets
        return names if self.kind == "train" else tuple(name for name in names if name != HELDOUT)


@dataclass(frozen=True)
class Study:
    """A study file, with the settings of the command line in it."""

    path: Path
    title: str
    config: Path
    variants: tuple[Variant, ...]
    figures: tuple[str, ...]


def read_study(path: Path, overrides: Mapping[str, Any], smoke: bool, rows: Mapping[str, str]) -> Study:
    """Read a study and check every variant's settings.

    Args:
        overrides: settings of all variants, which take precedence over the file; a key below a section that a variant
            leaves out (`distillation: null`) does not reach it.
        smoke: whether the file's `smoke` settings are added to `set`.
        rows: further models to measure, by name.

    Raises:
        UserError: names the study, the variant and the field; or an override has no effect on any variant.
    """
    tree = _read_tree(path)
    config = (path.parent / tree["config"]).resolve()
    common = {**_settings(tree, "set", path), **(_settings(tree, "smoke", path) if smoke else {})}
    if smoke and not tree.get("smoke"):
        raise UserError(f"{path}: `smoke` is missing. Give the settings of a small run below it, or remove --smoke.")
    given = [(name, *_parts(path, name, entry)) for name, entry in tree["variants"].items()]
    given += [(name, "eval", model, {}) for name, model in rows.items()]
    each: list[int] | list[None] = _seeds(tree, path)
    seeds = {"train": each, "prune": each, "eval": [None]}
    _check_names(path, [_label(name, seed) for name, kind, *_ in given for seed in seeds[kind]])
    variants, unused = [], list(overrides)
    for name, kind, model, own in given:
        reaching = _reaching(overrides, {**common, **own})
        settings = {**common, **own, **reaching}
        try:
            resolved = load_config(config, as_overrides(settings))
            for seed in seeds[kind]:
                own_seed = {} if seed is None else _seed_settings(settings, resolved, seed)
                seeded = resolved if seed is None else _with_seed(resolved, own_seed)
                own_settings = {**settings, **own_seed}
                variant = Variant(name=name, kind=kind, model=model, settings=own_settings, config=seeded, seed=seed)
                variants.append(variant)
            _check_commands(variants[-1])
        except UserError as error:
            raise UserError(f"{path}, variant {name!r}: {error}") from None
        for key in [key for key in unused if key in reaching]:
            before = {**common, **own, **{other: value for other, value in reaching.items() if other != key}}
            if kind == "train" or _is_changed(replace(variants[-1], config=resolved), config, before):
                unused.remove(key)
    if unused:
        raise UserError(
            f"--set {unused[0]}={json.dumps(overrides[unused[0]])} has no effect on any variant of {path}: each is not "
            "trained, or leaves the section out. Remove it."
        )
    return Study(path, tree.get("title", path.stem), config, tuple(variants), tuple(tree.get("figures") or ()))


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings as `section.key=value` lines; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def commands(study: Study, variant: Variant, folder: Path) -> list[list[str]]:
    """The `ast-…` commands that make a variant, as modules and their arguments."""
    if variant.kind == "train":
        values = [argument for line in as_overrides(variant.settings) for argument in ("--set", line)]
        resume = ["--resume"] if (folder / "config.yaml").exists() else []
        base = ["--config", str(study.config), *values, "--output-dir", str(folder)]
        return [["ast_sparse.cli.train", *base, *resume]]
    return _other_commands(variant, folder)


def _other_commands(variant: Variant, folder: Path) -> list[list[str]]:
    prune = [_prune_command(variant.config, folder)] if variant.kind == "prune" else []
    return [*prune, *(_eval_command(variant, folder, name) for name in variant.datasets)]


def eval_file(folder: Path, dataset: str) -> Path:
    """Where ast-eval writes the results of a data set."""
    return folder / f"eval_{Path(dataset).stem}.json"


def _prune_command(config: RunConfig, folder: Path) -> list[str]:
    settings, method = config.calibration, METHODS[config.sparsity.init]
    changes = config.basis is not None and config.basis.is_on
    options: dict[str, Any] = {"method": config.sparsity.init, "pattern": config.sparsity.pattern, "dtype": "float32"}
    if method.needs_text or changes:
        options |= {
            "samples": settings.samples, "seq-len": settings.seq_len or config.data.block_size, "seed": settings.seed,
            "text-field": config.data.text_field, "bos": config.data.bos,
        }  # fmt: skip
    if method.needs_hessian or (config.basis is not None and config.basis.rotation_steps):
        options["damping"] = settings.damping
    if method.needs_hessian:
        options["block-size"] = settings.block_size
    if settings.recovery_epochs:
        for key in ("recovery_epochs", "recovery_learning_rate", "recovery_batch_size"):
            options[key.replace("_", "-")] = getattr(settings, key)
    if config.basis is not None and config.basis.rotation_steps:
        options["rotation-steps"] = config.basis.rotation_steps
    if (slorb := slorb_of(config)) is not None:
        options["slorb-k"] = slorb.k
    if config.training.get("use_cpu"):
        options["device"] = "cpu"
    lists = {"include": config.sparsity.include, "exclude": config.sparsity.exclude}
    if method.needs_text or changes:
        lists["calibration"] = tuple(_calibration_files(config))
    repeated = [argument for key, values in lists.items() for value in values for argument in (f"--{key}", value)]
    single = [argument for key, value in options.items() for argument in (f"--{key}", str(value))]
    flags = ["--permute"] if config.basis is not None and config.basis.permute else []
    flags += ["--keep-zeros"] if settings.keep_zeros and method.needs_hessian else []  # the others always keep them
    model = config.model.name_or_path
    return ["ast_sparse.cli.prune", model, str(folder), *single, *flags, *repeated, *_model_options(config)]


def _eval_command(variant: Variant, folder: Path, dataset: str) -> list[str]:
    config = variant.config
    settings = config.evaluation
    model = str(folder) if variant.kind == "prune" else variant.model or config.model.name_or_path
    is_base = variant.kind == "eval" and variant.model is None
    text = dataset if dataset == WIKITEXT2 else _below_root(config, dataset)
    options = {
        "dataset": text, "seq-len": settings.seq_len, "limit": settings.windows,
        "data-dir": settings.data_dir if dataset == WIKITEXT2 else None,
        "text-field": config.data.text_field, "bos": config.data.bos, "dtype": "float32",  # as in a training run
        "json": eval_file(folder, dataset), "device": "cpu" if config.training.get("use_cpu") else None,
    }  # fmt: skip
    given = [argument for key, value in options.items() if value is not None for argument in (f"--{key}", str(value))]
    trusted = ["--trust-remote-code"] if config.model.trust_remote_code else []
    attention = config.model.attn_implementation
    given += ["--attn-implementation", attention] if attention else []
    return ["ast_sparse.cli.eval", model, *given, *(_model_options(config) if is_base else trusted)]


def _model_options(config: RunConfig) -> list[str]:
    """Options that find the base model."""
    model = config.model
    revision = ["--revision", model.revision] if model.revision else []
    gguf = ["--gguf-file", model.gguf_file] if model.gguf_file else []
    return [*revision, *gguf, *(["--trust-remote-code"] if model.trust_remote_code else [])]


def _calibration_files(config: RunConfig) -> list[str]:
    files = []
    entries = config.calibration.data or config.data.train
    if entries is None:
        raise UserError("`run: prune` calibrates on files, and data.train is not set. Set calibration.data.")
    for entry in entries:
        if not isinstance(entry, str):
            raise UserError(f"`run: prune` calibrates on files, and {entry!r} is not a file. Set calibration.data.")
        files.append(_below_root(config, entry))
    return files


def _below_root(config: RunConfig, name: str) -> str:
    return str(Path(config.data.root or "").expanduser() / Path(name).expanduser())


def _read_tree(path: Path) -> dict[str, Any]:
    """The mapping of a study file, its keys and their types checked."""
    if not path.is_file():
        raise UserError(f"Study {str(path)!r} is not a file. Name a YAML file, for example one of scripts/studies.")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Study {str(path)!r} cannot be read ({error}). Give a readable UTF-8 file.") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is {kind_of(tree)}, not a mapping. It needs `config` and `variants`.")
    for key in tree:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {key!r}. Known: {', '.join(KEYS)}.")
    if not isinstance(tree.get("variants"), dict) or not isinstance(tree.get("config"), str):
        raise UserError(f"{path}: `config` (a file) and `variants` (settings by name) are needed.")
    if not isinstance(tree.get("title", ""), str):
        raise UserError(f"{path}: title={tree['title']!r} is {kind_of(tree['title'])}, not text. Put it in quotes.")
    figures = tree.get("figures") or []
    for name in figures if isinstance(figures, list) else [figures]:
        if name not in FIGURES:
            raise UserError(f"{path}: figures={figures!r} is not a list of {', '.join(FIGURES)}. Correct it.")
    return tree


def _settings(tree: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    values = tree.get(key) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: `{key}` is {kind_of(values)}, not settings by name (`section.key: value`).")
    return values


def _parts(path: Path, name: str, entry: Any) -> tuple[str, str | None, dict[str, Any]]:
    """Kind, model and own settings of a variant."""
    own = dict(_settings({name: entry}, name, path))
    kind, model = own.pop("run", "train"), own.pop("model", None)
    if kind not in KINDS:
        raise UserError(f"{path}: variants.{name}.run={kind!r} is unknown. Use {', '.join(KINDS)}.")
    if model is not None and (kind != "eval" or not isinstance(model, str)):
        raise UserError(
            f"{path}: variants.{name}.model={model!r} names a model for `run: eval`. Elsewhere set model.name_or_path."
        )
    return kind, model, own


def _reaching(overrides: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides that reach a variant: `distillation.alpha` would give one without a teacher a teacher."""
    keys = list(settings)
    off = [
        f"{key}." for number, key in enumerate(keys)
        if settings[key] is None and key not in overrides and not any(x.startswith(f"{key}.") for x in keys[number:])
    ]  # fmt: skip
    return {key: value for key, value in overrides.items() if not key.startswith(tuple(off))}


def _is_changed(variant: Variant, config: Path, before: Mapping[str, Any]) -> bool:
    """Whether a setting matters to a variant that is not trained: its commands differ from those of `before`.

    A setting that was so before matters too.
    """
    try:
        other = replace(variant, config=load_config(config, as_overrides(before)))
        is_same = _other_commands(variant, Path()) == _other_commands(other, Path())
    except UserError:  # without it the variant would be refused
        return True
    return not is_same or other.config == variant.config


def _seeds(tree: dict[str, Any], path: Path) -> list[int] | list[None]:
    """The seeds that each variant is run with; [None] if the study names none."""
    seeds = tree.get("seeds")
    if seeds is None:
        return [None]
    are_numbers = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not are_numbers or not seeds or len({*seeds}) < len(seeds):
        raise UserError(f"{path}: seeds={seeds!r} is not a list of different whole numbers, 0 or more. Correct it.")
    return list(seeds)


def _seed_settings(settings: Mapping[str, Any], config: RunConfig, seed: int) -> dict[str, Any]:
    """`seed` for training and calibration; the held-out text, chosen by `data.seed`, is the same in all runs."""
    seeded = {"training.seed": seed, "calibration.seed": seed}
    if config.training.get("data_seed") is not None:
        seeded["training.data_seed"] = seed
    if twice := next((key for key in seeded if key in settings), None):
        raise UserError(f"{twice}={settings[twice]!r} would be replaced by each of `seeds`. Remove one of them.")
    return seeded


def _with_seed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The configuration with the settings of `_seed_settings`."""
    training = {key.removeprefix("training."): seed for key, seed in settings.items() if key.startswith("training.")}
    calibration = replace(config.calibration, seed=settings["calibration.seed"])
    return replace(config, training={**config.training, **training}, calibration=calibration)


def _label(name: str, seed: int | None) -> str:
    return name if seed is None else f"{name}, seed {seed}"


def _folder(name: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", name)


def _check_names(path: Path, names: list[str]) -> None:
    if not names:
        raise UserError(f"{path}: `variants` is empty. Give at least one, or --row NAME=MODEL.")
    folders: dict[str, str] = {}
    for name in names:
        folder = _folder(name)
        if folder.strip("._") == "" or folder in _RESERVED:
            raise UserError(f"{path}: a variant cannot be called {name!r}. Give it another name.")
        if folder in folders:
            raise UserError(f"{path}: variants {folders[folder]!r} and {name!r} would share the folder {folder!r}.")
        folders[folder] = name


def _check_commands(variant: Variant) -> None:
    """Check what `load_config` cannot: the texts that prune and eval need, and that the model exists."""
    if variant.kind == "train":
        return
    if not variant.datasets:
        names = list(variant.config.evaluation.datasets)
        raise UserError(f"evaluation.datasets={names} has no text for `run: {variant.kind}`. Add wikitext2 or a file.")
    stems = [Path(name).stem for name in variant.datasets]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        raise UserError(f"evaluation.datasets has two texts called {twice!r}, one column of the table. Rename one.")
    if variant.model is None and variant.config.model.random_weights:
        raise UserError(
            f"model.random_weights=True does not reach `run: {variant.kind}`, which takes the real weights. Set it to "
            "false for this variant, or use `run: train`."
        )
    if variant.model is None and variant.config.model.config_overrides:
        raise UserError(
            f"model.config_overrides={variant.config.model.config_overrides!r} does not reach `run: {variant.kind}`, "
            "whose results would be those of another model. Write them into config.json of the model."
        )
    if variant.kind == "prune":
        _check_basis(variant.config.basis)
        _check_slorb(variant.config)
        _prune_command(variant.config, Path())
    model = variant.model or ""
    looks_local = model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf")
    if looks_local and not Path(model).expanduser().exists():
        raise UserError(f"model {model!r} does not exist. Correct it.")


def _check_basis(basis: BasisConfig | None) -> None:
    """Refuse settings of the change of basis that ast-prune has no option for."""
    if basis is None or not basis.rotation_steps:
        return
    default = BasisConfig(permute=basis.permute, rotation_steps=basis.rotation_steps)
    for key, value in basis.to_dict().items():
        if value != getattr(default, key):
            raise UserError(f"basis.{key}={value!r} does not reach `run: prune`. Remove it, or use `run: train`.")


def _check_slorb(config: RunConfig) -> None:
    """Refuse SLoRB that ast-prune, which only has an option for `k`, would make in another way."""
    slorb = slorb_of(config)
    if slorb is None:
        return
    made = SLoRBConfig(k=slorb.k, init="svd" if METHODS[config.sparsity.init].needs_text else "mean")
    for key, value in slorb.to_dict().items():
        if value != getattr(made, key):
            raise UserError(
                f"slorb.{key}={value!r} does not reach `run: prune`, where it is {getattr(made, key)!r}. Set it so, or "
                "`slorb: null`, or use `run: train`."
            )
