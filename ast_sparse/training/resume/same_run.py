"""Checks that a resumed run is the same run as its checkpoint: settings by class, and inputs by content."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ast_sparse.config import SECTIONS, DistillationConfig, RunConfig, SLoRBConfig, SparsityConfig
from ast_sparse.distributed.pieces import is_sharded
from ast_sparse.distributed.ranks import errors_shared
from ast_sparse.errors import UserError, shown
from ast_sparse.storage.files import SPARSITY_CONFIG_NAME, read_json, write_json
from ast_sparse.storage.sparsity_record import SparsityRecord
from ast_sparse.training.resume.checkpoints import RUN_RECORD
from ast_sparse.training.resume.fingerprints import (
    blocks_fingerprint,
    config_values,
    tokenizer_values,
    weights_fingerprint,
)
from ast_sparse.training.resume.older_runs import check_bos, stored_training
from ast_sparse.training.resume.setting_classes import (
    comparable_optimizers,
    comparable_training,
    depending,
    is_own_optimizer,
    kind_of,
    optimizer_values,
    past_follows_length,
    plain,
    rest_follows_length,
    training_values,
)

_FORMAT_VERSION = 1
_ROUNDING = 1e-6  # of steps
_NEW_RUN = "or start a new run with another output folder."
# inputs compared by content: the settings that name them, the argument of SparseTrainer, and what may differ
_CONTENT = {
    "model": (("model.name_or_path", "model.revision", "model.gguf_file"), "model", "weights"),
    "teacher": (("model.teacher",), "teacher_model", "weights"),
    "tokenizer": (("model.name_or_path", "model.revision"), "processing_class", "tokenizer"),
    "train": (("data.train", "data.root", "data.text_field", "data.eval"), "train_dataset", "tokens"),
    "eval": (("data.eval", "data.root", "data.text_field"), "eval_dataset", "tokens"),
}
_NUMBERS = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
_CHANGED_BY_SIGNALS = ("save_only_model", "save_strategy")  # so that the step at which a signal arrives is saved
Settings = dict[str, dict[str, Any] | None]


def run_settings(config: RunConfig) -> Settings:
    """The sections of a configuration that SparseTrainer does not see, as a checkpoint saves them."""
    data = config.data.to_dict()
    if config.data.domains:  # paths are compared by content
        domains = config.data.domain_configs
        data["domains"] = {name: {"share": part.share, "target": part.target} for name, part in domains.items()}
        data["train"], data["eval"] = (
            {n: getattr(part, key) for n, part in domains.items()} for key in ("train", "eval")
        )
    sections = {"model": config.model.to_dict(), "data": data, "evaluation": config.evaluation.to_dict()}
    return {name: plain(section) for name, section in sections.items()}


class RunRecord:
    """The record of a run in its checkpoints (`run.json`), and the comparison with the resumed run.

    Only the first process compares; all processes raise the error that it finds.

    Args:
        model: the dense model, before masks are made.
        args: of the run.
        settings: the sections that the trainer has.
        update_rule: `data.update.type`.

    Attributes:
        sections: settings that the trainer does not see; ast-train sets `run_settings`.
        content: fingerprints, on the first process.
    """

    def __init__(
        self, model: PreTrainedModel, args: TrainingArguments, settings: Mapping[str, Any], update_rule: str
    ) -> None:
        self.sections: Settings = {}
        self._settings, self._update_rule = plain(settings), update_rule
        self._saving = {name: plain(getattr(args, name)) for name in _CHANGED_BY_SIGNALS}
        self._is_first = args.process_index == 0
        self.content: dict[str, Any] = {}
        self.add(model, "model")

    def add(self, model: PreTrainedModel, name: str = "teacher") -> None:
        """Record the content of a model, sharded or not; every process must call this."""
        if self._is_first or is_sharded(model):
            self.content[name] = weights_fingerprint(model)
            self.content[f"{name}_config"] = config_values(model.config)

    def save(self, trainer: Any, folder: Path) -> None:
        """Write `run.json`; call this on the first process."""
        write_json(folder / RUN_RECORD, {"format_version": _FORMAT_VERSION, **self._now(trainer)})

    def check(self, trainer: Any, checkpoint: Path, lines: Sequence[str] = ()) -> None:
        """Compare with a checkpoint, and print `lines` and the differences that are allowed; every process calls it.

        Raises:
            UserError: a setting, the model, the teacher, the tokenizer or the text differs from the checkpoint's.
        """
        with errors_shared():
            if self._is_first:
                for line in [*lines, *self._compare(trainer, checkpoint)]:
                    print(line)

    def _now(self, trainer: Any) -> dict[str, Any]:
        if "train" not in self.content:
            tokenizer = trainer.processing_class
            self.content["tokenizer"] = None if tokenizer is None else tokenizer_values(tokenizer)
            self.content["train"] = blocks_fingerprint(trainer.train_dataset)
            self.content["eval"] = blocks_fingerprint(trainer.eval_dataset)
        is_own = trainer.optimizer is None or trainer.made_optimizer
        settings = {
            **self._settings,
            **self.sections,
            "optimizer": trainer.optimizer_config.to_dict() if is_own else optimizer_values(trainer.optimizer),
            "training": {**training_values(trainer.args), **self._saving},
        }
        return {"processes": trainer.args.world_size, "settings": settings, "content": self.content}

    def _compare(self, trainer: Any, checkpoint: Path) -> list[str]:
        saved, now = _read(checkpoint), self._now(trainer)
        args, sparsity, slorb = trainer.args, trainer.sparsity_config, trainer.slorb_config
        lines = []
        if saved is None:
            lines.append(
                f"resume: {str(checkpoint)!r} is from a version that saved no settings: only sparsity, SLoRB, "
                "distillation, the optimizer, the steps and the blocks of shards are compared."
            )
            if self.sections:
                check_bos(checkpoint, self.sections["data"] or {}, trainer.processing_class, trainer.train_dataset)
        lines += _settings_differences(checkpoint, saved, now, depending(args, sparsity, self._update_rule))
        lines += _length_differences(checkpoint, saved, args, sparsity, slorb)
        trainer.check_data_state(checkpoint)
        if saved is not None:
            lines += _content_differences(checkpoint, saved, now)
        return lines


def check_settings(
    checkpoint: Path, config: RunConfig, args: TrainingArguments, slorb: SLoRBConfig | None, processes: int
) -> list[str]:
    """Compare what can be compared before anything is loaded, and return lines on the differences that are allowed.

    Args:
        processes: number of processes of the resumed run.

    Raises:
        UserError: a setting that must match the checkpoint differs.
    """
    saved, distillation = _read(checkpoint), config.distillation
    use_cpu = config.training.get("use_cpu", False)
    pinned = not use_cpu and config.training.get("dataloader_pin_memory", True)
    settings = {
        "distillation": None if distillation is None else distillation.to_dict(),
        "calibration": config.calibration.to_dict(),
        "watch": config.watch.to_dict(),
        "optimizer": config.optimizer.to_dict(),
        **run_settings(config),
        # a dry run sets `use_cpu`, which turns off `dataloader_pin_memory`
        "training": {**training_values(args), "use_cpu": use_cpu, "dataloader_pin_memory": pinned},
    }
    now = {"processes": processes, "settings": plain(settings)}
    strict = depending(args, config.sparsity, config.data.mixture.type)
    lines = _settings_differences(checkpoint, saved, now, strict)
    if distillation is None or not distillation.match_flops:  # it makes a run longer
        lines += _length_differences(checkpoint, saved, args, config.sparsity, slorb)
    return lines


def _settings_differences(
    checkpoint: Path, saved: dict[str, Any] | None, now: Mapping[str, Any], strict: set[str]
) -> list[str]:
    record = SparsityRecord.from_dict(read_json(checkpoint / SPARSITY_CONFIG_NAME))
    was: Settings = {"distillation": record.distillation}
    if saved is None:
        was["training"] = plain(stored_training(checkpoint)) if is_own_optimizer(now["settings"]["optimizer"]) else {}
        training = {key: now["settings"]["training"][key] for key in was["training"] or {}}
        return differences(checkpoint, was, {**now["settings"], "training": training}, strict)
    was |= saved["settings"]
    was["optimizer"], own = comparable_optimizers(was.get("optimizer"), now["settings"]["optimizer"])
    lines = differences(checkpoint, was, {**now["settings"], "optimizer": own}, strict)
    return [*lines, *_batch_differences(checkpoint, saved, now)]


def _read(checkpoint: Path) -> dict[str, Any] | None:
    """The record of a checkpoint; None if the checkpoint is older than such records."""
    path = checkpoint / RUN_RECORD
    if not path.is_file():
        return None
    saved = read_json(path)
    settings: Any = saved.get("settings")
    training: Any = settings.get("training") if isinstance(settings, dict) else None
    is_whole = (
        isinstance(training, dict)
        and isinstance(saved.get("content"), dict)
        and all(values is None or isinstance(values, dict) for values in settings.values())
        and all(isinstance(number, int | float) for number in [saved.get("processes"), *map(training.get, _NUMBERS)])
    )
    if saved.get("format_version") != _FORMAT_VERSION or not is_whole:
        raise UserError(f"{path} is damaged, or from a later version. Resume from another checkpoint.")
    return saved


def differences(checkpoint: Path, was: Settings, now: Settings, strict: set[str]) -> list[str]:
    """Lines on the settings that differ and are allowed to.

    Args:
        was, now: by section; sections that only one of them has are not compared.
        strict: settings or sections that may differ in other runs, but not in this one.

    Raises:
        UserError: the first setting that must be the same, but is not.
    """
    lines = []
    if (now.get("data") or {}).get("streaming"):  # only the beginning of a stream is compared by content
        strict = strict | {"data.train"}
    for section in [name for name in now if name in was]:
        old, new = was[section], now[section]
        if (old is None) != (new is None):
            raise UserError(_refusal(section, old, new, checkpoint))
        for key, before, value in _changed(section, old or {}, new or {}):
            name, kind = f"{section}.{key}", kind_of(section, key)
            if kind == "same" or name in strict or section in strict:
                raise UserError(_refusal(name, before, value, checkpoint))
            if kind == "free":
                lines.append(f"resume: {name} {_text(before)} -> {_text(value)}")
    return lines


def _changed(section: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys that differ, with both values; a setting that is newer than the checkpoint had its default there."""
    made = {**SECTIONS, "training": TrainingArguments}.get(section)
    fields = () if made is None else dataclasses.fields(made)
    defaults = {item.name: plain(item.default) for item in fields if item.default is not dataclasses.MISSING}
    comparable = {"distillation": _with_weights, "training": comparable_training}.get(section, dict)
    was, now = comparable(was), comparable(now)
    for key, value in now.items():
        before = was.get(key, defaults.get(key))
        if before != value and not {str(before), str(value)} <= {"None", "{}"}:  # both mean that nothing is set
            yield key, before, value


def _with_weights(distillation: Mapping[str, Any]) -> dict[str, Any]:
    """The section with α and both weights, whichever of them were set."""
    keys = ("alpha", "ce_weight", "kl_weight")
    given: Any = {key: distillation.get(key) for key in keys}
    ce, kl = DistillationConfig(**given).weights
    alpha = {"alpha": kl} if ce == 1 - kl else {}
    rest = {key: value for key, value in distillation.items() if key not in keys}
    return {**alpha, "ce_weight": ce, "kl_weight": kl, **rest}


def _refusal(name: str, was: Any, now: Any, checkpoint: Path) -> str:
    name, was, now = _innermost(name, was, now)
    fix = "with the section of the run" if isinstance(was, dict) else f"with {name}={_text(was)}"
    fix = "without it" if was is None else fix
    return f"{name}={_text(now)} differs from {_text(was)} in {str(checkpoint)!r}. Resume {fix}, {_NEW_RUN}"


def _innermost(name: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """The nested key at which two mappings differ, with both values."""
    while isinstance(was, dict) and isinstance(now, dict) and was != now:
        key = next(key for key in [*now, *was] if was.get(key) != now.get(key))
        name, was, now = f"{name}.{key}", was.get(key), now.get(key)
    return name, was, now


def _text(value: Any) -> str:
    """A value for a message; whole numbers without a decimal point, as in a configuration."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else shown(value)


def _length_differences(
    checkpoint: Path,
    saved: dict[str, Any] | None,
    args: TrainingArguments,
    sparsity: SparsityConfig,
    slorb: SLoRBConfig | None,
) -> list[str]:
    """Lines on the number of steps, which may change if the masks so far do not depend on it.

    Learning rate and mask decay then follow the new number from here on, and a line says so. Past steps do not change.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    steps, was = state.max_steps, None if saved is None else saved["settings"]["training"]
    past, rest = past_follows_length(sparsity, slorb), rest_follows_length(args, sparsity)
    if args.max_steps > 0:
        name, before, value = "training.max_steps", steps, args.max_steps
        said = f"the {steps} steps that the run began with"
    elif was is not None:
        name = "training.max_steps" if was["max_steps"] > 0 else "training.num_train_epochs"
        before, value = was[name.removeprefix("training.")], getattr(args, name.removeprefix("training."))
        said = f"{before} in {str(checkpoint)!r}"
    else:
        return []
    if before == value:
        return []
    if past is not None:
        raise UserError(
            f"{name}={value} differs from {said}, and {past} depends on the number of steps. Resume with "
            f"{name}={before}, {_NEW_RUN}"
        )
    limit, end = "max_steps", float(args.max_steps)
    if args.max_steps <= 0 and state.epoch:
        limit = "num_train_epochs"  # an epoch ends with a whole step
        end = math.ceil(args.num_train_epochs * state.global_step / state.epoch - _ROUNDING)
    if 0 < end < state.global_step:
        raise UserError(
            f"training.{limit}={_text(getattr(args, limit))} ends before step {state.global_step} of "
            f"{str(checkpoint)!r}. Resume from an earlier checkpoint, or raise {limit}."
        )
    note = f" ({' and '.join(rest)} with the new number of steps from here on)" if rest else ""
    return [f"resume: {name} {_text(before)} -> {_text(value)}{note}"]


def _batch_differences(checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines on how processes and micro-batches share the sequences of a step; UserError if their number changed."""
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    splits = []
    for record in (saved, now):
        training = record["settings"]["training"]
        splits.append((training[keys[0]], training[keys[1]], record["processes"]))
    (was, old), (value, new) = ((batch[0] * batch[1] * batch[2], batch) for batch in splits)
    if was != value:
        raise UserError(
            f"training.{keys[0]}={new[0]} x {keys[1]}={new[1]} x {new[2]} processes = {value} sequences a step differs "
            f"from {old[0]} x {old[1]} x {old[2]} = {was} in {str(checkpoint)!r}. Keep the product, {_NEW_RUN}"
        )
    names = (f"training.{keys[0]}", f"training.{keys[1]}", "processes")
    return [f"resume: {name} {a} -> {b}" for name, a, b in zip(names, old, new, strict=True) if a != b]


def _content_differences(checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines on inputs that moved but have the same content; UserError if the content differs."""
    was, has = saved["content"], now["content"]
    moved: dict[str, tuple[Any, Any]] = {}
    for section, values in now["settings"].items():
        for key, before, value in _changed(section, saved["settings"].get(section) or values or {}, values or {}):
            if kind_of(section, key) == "content":
                moved[f"{section}.{key}"] = (before, value)
    _check_config(checkpoint, "model", was.get("model_config"), has["model_config"])
    for key, (names, argument, what) in _CONTENT.items():
        old, new = was.get(key), has.get(key)
        named = [name for name in names if name in moved]
        is_unknown = key == "train" and new is None and bool(named)  # rows that can be read only once
        if old == new and not is_unknown:
            continue
        if named:
            name, before, value = _innermost(named[0], *moved[named[0]])
            if named[0] in ("data.train", "data.eval") and name != named[0]:  # in a domain
                name = f"data.domains.{name.removeprefix(named[0] + '.')}.{named[0].removeprefix('data.')}"
            start = f"{name}={shown(value)} differs from {shown(before)} in {str(checkpoint)!r}"
        else:
            subject = _subject(key, names, argument, now["settings"])
            start = f"{subject} is not what {str(checkpoint)!r} was trained with"
        raise UserError(f"{start}: {_said(what, old, new)}. Resume with the original, {_NEW_RUN}")
    _check_config(checkpoint, "teacher", was.get("teacher_config"), has.get("teacher_config"))
    return [f"resume: {name} {shown(a)} -> {shown(b)} (the same content)" for name, (a, b) in moved.items()]


def _subject(key: str, names: tuple[str, ...], argument: str, settings: Settings) -> str:
    """The name that the user knows: a setting with its value, or an argument of SparseTrainer."""
    section, field = names[0].split(".")
    if (values := settings.get(section)) is None or field not in values:
        return argument
    name = "data.train" if key == "eval" and not values["eval"] else names[0]  # held out from it
    return f"{name}={shown(values[name.split('.')[1]])}"


def _said(what: str, was: Any, now: Any) -> str:
    """What differs, with both values."""
    if isinstance(was, dict) and isinstance(now, dict):
        key = next((key for key in [*now, *was] if was.get(key) != now.get(key)), "order")
        what, was, now = f"{what}, {key}", was.get(key), now.get(key)
    if was == now:
        return f"the {what} cannot be compared"
    return f"the {what} differ (fingerprint {str(now)[:8]}, stored {str(was)[:8]})"


def _check_config(checkpoint: Path, which: str, was: Any, now: Any) -> None:
    if not isinstance(was, dict) or not isinstance(now, dict):
        return
    fix = "config.json or model.config_overrides" if which == "model" else "config.json"
    for key in [*now, *was]:
        if was.get(key) != now.get(key):
            raise UserError(
                f"The {which}'s configuration has {key}={shown(now.get(key))}, but {shown(was.get(key))} in "
                f"{str(checkpoint)!r}. Correct its {fix}, {_NEW_RUN}"
            )
