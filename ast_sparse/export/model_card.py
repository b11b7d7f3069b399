"""The model card of an export, README.md: what it is, how to load and serve it, what was measured, how it was made.

Every number comes from the export itself or from a file that the run wrote; what is not known is said or left out. A
card has no dates and no absolute paths: the same input gives the same text, and it can be published.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ast_sparse.config.yaml12 import dump_yaml
from ast_sparse.export.card_subject import Subject, shareable, shareable_values
from ast_sparse.export.formats import codecs
from ast_sparse.export.slorb_hint import VLLM_RANKS, vllm_options
from ast_sparse.export.summary import ExportReport, size_text
from ast_sparse.export.vllm_families import CONV1D_REASON, vllm_refusal
from ast_sparse.storage import files
from ast_sparse.storage.base_card import EXPORT_MARK, README, base_metadata, card_metadata, is_export_card, is_hub_id
from ast_sparse.storage.sparsity_record import SparsityRecord
from ast_sparse.storage.stage_results import WITHOUT_SLORB, is_result
from ast_sparse.storage.versions import versions

SOURCE_README = "SOURCE_README.md"  # the card that the source had
_PAPER = "[AST](https://arxiv.org/abs/2407.20584)"
_READERS = {"arrow", "csv", "json", "pandas", "parquet", "sql", "text", "xml"}  # of `datasets`, not data sets


def write_card(folder: Path, subject: Subject, report: ExportReport) -> None:
    """Write the card of an export that is otherwise complete; a card that came with the source gets another name."""
    path = folder / README
    if path.is_file() and not is_export_card(path):
        path.replace(folder / SOURCE_README)
    known = _known(subject)
    text = "\n\n".join(part for part in _parts(folder, subject, report, known) if part)
    yaml = _metadata(folder, subject, report, known).to_yaml(line_break="\n")
    card = ModelCard(f"---\n{yaml}\n---\n\n{EXPORT_MARK}\n\n{text}\n", ignore_metadata_errors=True)
    path.write_text(str(card), encoding="utf-8")


def _known(subject: Subject) -> dict[str, Any]:
    """What cards and files say about the licence and the languages of the model."""
    known = card_metadata(subject.origin / README) if subject.origin else {}
    base = subject.record.get("base_model")
    if base and known.get("license") in (None, "unknown"):
        known = {**known, **base_metadata(str(base), subject.record.get("base_commit"))}
    return known


def _metadata(folder: Path, subject: Subject, report: ExportReport, known: Mapping[str, Any]) -> ModelCardData:
    license, link = known.get("license"), known.get("license_link")
    if license is None and (file := _licence_file(folder)) is not None:
        license, link = "other", file
    base: Any = subject.base_id
    if base is None and subject.record.get("base_model") is None:
        base = _hub_ids(known.get("base_model"))  # the card of the same model
    return ModelCardData(
        license=license or "unknown",
        license_name=known.get("license_name"),
        license_link=link,
        base_model=base or None,
        language=known.get("language"),
        datasets=_datasets(subject.record) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ast_sparse", "sparse", report.pattern],
    )


def _hub_ids(named: Any) -> Any:
    """A base model, or several, as a card names them; nothing that is not a hub id."""
    if isinstance(named, list):
        return [each for each in named if isinstance(each, str) and is_hub_id(each)]
    return named if isinstance(named, str) and is_hub_id(named) else None


def _licence_file(folder: Path) -> str | None:
    names = sorted(path.name for path in folder.iterdir() if path.name.upper().startswith(("LICENSE", "LICENCE")))
    return next(iter(names), None)


def _datasets(record: SparsityRecord) -> list[str]:
    """Hub ids of the data sets that the run was trained on."""
    data = record.get("run", "config", "data") or {}
    lists = [data.get("train"), *(domain.get("train") for domain in (data.get("domains") or {}).values())]
    paths = [entry.get("path") for entries in lists for entry in entries or () if isinstance(entry, dict)]
    names = dict.fromkeys(str(path) for path in paths if path)
    return [name for name in names if is_hub_id(name) and name not in _READERS and not Path(name).exists()]


def _parts(folder: Path, subject: Subject, report: ExportReport, known: Mapping[str, Any]) -> Iterator[str]:
    yield f"# {_plain(subject.title)} with {report.pattern} sparsity"
    yield _summary(subject, report)
    if (folder / SOURCE_README).is_file():
        yield f"[{SOURCE_README}]({SOURCE_README}) is the card of the model that it was made from."
    yield _table(("", ""), [(what, text) for what, text in _facts(folder, subject, report, known) if text])
    yield "## Load it"
    yield from _loading(subject, report)
    yield "## Serve it"
    yield from _serving(subject, report)
    yield "## Perplexity"
    yield from _perplexity(subject, report)
    yield "## How it was made"
    yield from _making(subject, report)


def _summary(subject: Subject, report: ExportReport) -> str:
    name = f"`{_code(subject.base or subject.title)}`"
    if subject.base_id is not None:
        name = f"[{subject.base_id}](https://huggingface.co/{subject.base_id})"
    method = subject.record.get("one_shot", "method")
    if subject.record.get("trained", "steps") == 0:
        method = subject.record.get("sparsity", "init")
    if method is not None:
        how = f"{name}, pruned to {report.pattern} sparsity in one shot ({method}) with ast_sparse. It was not trained."
    elif isinstance(subject.record.get("sparsity"), dict):
        how = f"{name}, retrained to {report.pattern} sparsity with ast_sparse, which implements {_PAPER}."
    else:
        how = f"{name} has {report.pattern} sparsity. How it was made sparse is not recorded."
    if ":" in report.pattern:
        n, m = report.pattern.split(":")
        how += f" Each output of a pruned layer uses at most {n} of every {m} neighbouring inputs."
    codec = codecs().get(report.format)
    if codec is None:
        return (
            f"{how} The zeros are written out, so this is an ordinary checkpoint: nothing but transformers is needed."
        )
    return f"{how} The pruned layers are stored compressed, without their zeros (`{codec.method}`)."


def _facts(
    folder: Path, subject: Subject, report: ExportReport, known: Mapping[str, Any]
) -> Iterator[tuple[str, str | None]]:
    record = subject.record
    if subject.is_random:
        yield "architecture", f"that of `{_code(subject.base or '')}`; trained from random weights"
    else:
        base = subject.base_id or subject.base or _hub_ids(known.get("base_model"))
        yield "base model", _names(base) if base else "not recorded"
    says = "as the card of the source says" if record.get("base_model") is None else "that of the base model"
    yield "licence", _licence(folder, known, says)
    share = f"{report.nonzero_share:.1%} of {report.pruned.parameters:,} weights are not zero"
    yield "pruned", f"{report.pattern}, {report.pruned.layers:,} linear layers; {share}"
    if report.dense_layers:
        layer, reason = next(iter(report.dense_layers.items()))
        yield "linear layers left dense", f"{len(report.dense_layers):,}, such as `{_code(layer)}`: {_plain(reason)}"
    own = [row for row in report.rows[:-1] if row.section != "SLoRB"]
    stored, dense = sum(row.stored_bytes for row in own), sum(row.dense_bytes for row in own)
    beside = "" if stored == dense else f"; without compression {size_text(dense)}"
    codec = codecs().get(report.format)
    few = "" if codec is None or codec.value_bits is None else f"{codec.value_bits}-bit values in pruned layers, else "
    yield "weights", f"{few}{report.dtype}, {size_text(stored)}{beside}"
    yield "rounding", _rounding(record.get("rounding"))
    if merged := _merged(record):
        yield "merged adapters", f"{_names(merged)}, under the masks"
    if subject.ranks:
        size = sum(row.stored_bytes for row in report.rows[:-1] if row.section == "SLoRB")
        yield (
            "SLoRB",
            f"adapter in `{files.ADAPTER_FOLDER}/`, rank up to {max(subject.ranks.values())}, {size_text(size)}",
        )
    steps, tokens = record.get("trained", "steps"), record.get("trained", "tokens")
    if steps:
        yield "trained", f"{steps:,} steps" + ("" if tokens is None else f", {tokens:,} tokens")


def _rounding(done: Any) -> str | None:
    """How weights were rounded to few bits, the last rounding first; None if they were not."""
    if not isinstance(done, Mapping):
        return None
    how = f"pruned weights to the nearest step of {done.get('bits')} bits, without text"
    if done.get("method") == "awq":
        text = f"{done.get('sequences')} sequences of {done.get('seq_len')} tokens"
        how = (
            f"pruned weights to {done.get('bits')} bits by AWQ on {text}; it scales norms too, so an adapter of the "
            "source does not fit"
        )
    before = _rounding(done.get("before"))
    return how if before is None else f"{how}; before that {before}"


def _merged(record: SparsityRecord) -> list[str]:
    """Names of the adapters that were merged into the weights."""
    merged = record.get("merged_adapters")
    return [shareable(str(each)) for each in merged] if isinstance(merged, list) else []


def _licence(folder: Path, known: Mapping[str, Any], says: str) -> str:
    file = _licence_file(folder)
    named = known.get("license_name") or known.get("license")
    if named in (None, "unknown"):
        if file is not None:
            return f"see [{file}]({file})"
        return "unknown: none was found. Look for it before you share this model."
    also = f"; see [{file}]({file})" if file is not None else ""
    return f"{_names(named)}, {says}{also}"


def _names(value: Any) -> str:
    """One name or several, as metadata may have them."""
    return ", ".join(_code_span(str(each)) for each in (value if isinstance(value, list) else [value]))


def _loading(subject: Subject, report: ExportReport) -> Iterator[str]:
    place = json.dumps(subject.repo_id or "FOLDER", ensure_ascii=False)
    if subject.repo_id is None:
        yield "`FOLDER` is the folder of this card, or the id of its repository on the hub."
    compressed = report.format in codecs()
    if compressed:
        yield "This needs ast_sparse. Install it from a checkout of its repository: `pip install CHECKOUT`."
    lines = ["import ast_sparse  # registers the format"] if compressed else []
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({place})",
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
    ]
    if subject.ranks:
        where = f'{{"subfolder": "{files.ADAPTER_FOLDER}"}}'
        lines += [f"model.load_adapter({place}, adapter_kwargs={where})  # SLoRB; needs peft"]
    yield _block("python", lines)
    if subject.ranks:
        both = " The table below has both perplexities." if _has_both(subject) else ""
        yield f"The last line adds the SLoRB adapter. The model also works without it.{both}"
    if compressed:
        yield "The layers are decoded while they load. To keep them compressed in memory:"
        config = "ast_sparse.AstSparse24Config(dequantize=False)"
        yield _block("python", [f"model = AutoModelForCausalLM.from_pretrained({place}, quantization_config={config})"])


def _serving(subject: Subject, report: ExportReport) -> Iterator[str]:
    place = subject.repo_id or "FOLDER"
    compressed = report.format in codecs()
    kind = subject.model_type
    reason = CONV1D_REASON if subject.has_conv1d else vllm_refusal(kind)
    if compressed and reason is not None:
        yield f"vLLM cannot serve this: it is a {kind} model, whose {reason}. Export with `--format dense` for vLLM."
        return
    lines = ["pip install CHECKOUT  # ast_sparse, beside vLLM, which then reads the format"] if compressed else []
    yield _block("bash", [*lines, f"vllm serve {shlex.quote(place)}"])
    if not subject.ranks:
        return
    if subject.has_conv1d:
        yield "This serves the model without SLoRB."
        return
    rank = max(subject.ranks.values())
    options = vllm_options(rank, "FOLDER", compressed)
    if options is None:
        yield (
            f"This serves the model without SLoRB. The adapter has rank {rank}, and vLLM's LoRA takes at most "
            f"{VLLM_RANKS[-1]}. A compressed export is served with any rank."
        )
        return
    name = "ask for the model `slorb`; " if "lora" in options else ""
    yield f"This serves the model without SLoRB. With it ({name}`FOLDER` is a local folder):"
    yield _block("bash", [f"vllm serve FOLDER {options}"])


def _perplexity(subject: Subject, report: ExportReport) -> Iterator[str]:
    results: Mapping[str, Mapping[str, Any]] = subject.record.get("run", "results") or {}
    results = {stage: of for stage, of in results.items() if of}
    place = shlex.quote(subject.repo_id or "FOLDER")
    if not results:
        yield f"None is recorded. `ast-eval {place} --dataset wikitext2` measures one."
        return
    datasets = list(dict.fromkeys(name for of in results.values() for name in of))
    rows = [[_stage(stage, subject), *(_number(of.get(name)) for name in datasets)] for stage, of in results.items()]
    yield _table(["model", *map(_code_span, datasets)], rows)
    protocols = {name: next(of[name] for of in results.values() if name in of) for name in datasets}
    yield "\n".join(
        f"- {_code_span(name)}: {each['windows']:,} windows of {each['seq_len']:,} tokens; the text has "
        f"{each['total_tokens']:,} tokens"
        for name, each in protocols.items()
    )
    since = _since(subject.record)
    before = since or ("" if report.dtype == "float32" else f"they were rounded to {report.dtype}")
    before = f", before {before}" if before else ""
    yield f"Lower is better. The training run measured this on float32 weights{before}."
    if since:
        yield f"So none of these is the perplexity of this export. `ast-eval {place} --dataset wikitext2` measures it."
    if subject.ranks and not _has_both(subject):
        yield "The model without SLoRB was not measured."


def _since(record: SparsityRecord) -> str:
    """What happened to the weights after the run measured them, beside a change of dtype; empty if nothing did."""
    done = ["an adapter was merged into them"] if _merged(record) else []
    bits = record.get("rounding", "bits")
    done += [] if bits is None else [f"the pruned ones were rounded to {bits} bits"]
    return " and ".join(done)


def _has_both(subject: Subject) -> bool:
    """Whether the run measured its result also without SLoRB."""
    return any(stage.endswith(WITHOUT_SLORB) for stage in subject.record.get("run", "results") or {})


def _stage(stage: str, subject: Subject) -> str:
    had_slorb = _has_both(subject) or bool(subject.record.get("run", "config", "slorb", "enabled"))
    name = f"{stage} with SLoRB" if is_result(stage) and had_slorb else stage
    is_this = is_result(stage) if subject.ranks or not had_slorb else stage.endswith(WITHOUT_SLORB)
    return f"**{name}**" if is_this and not _since(subject.record) else name


def _number(result: Mapping[str, Any] | None) -> str:
    value = None if result is None else result.get("perplexity")
    return "not finite" if result is not None and value is None else "" if value is None else f"{value:.2f}"


def _prune_options(one_shot: Mapping[str, Any]) -> str:
    """The options of ast-prune that change the model most; all settings follow below."""
    basis, calibration, slorb = (one_shot.get(key) or {} for key in ("basis", "calibration", "slorb"))
    options = ""
    for key in ("revision", "gguf_file", "include", "exclude"):
        given = one_shot.get(key) or []
        for each in given if isinstance(given, list | tuple) else [given]:
            options += f" --{key.replace('_', '-')} {shlex.quote(shareable(str(each)))}"
    options += " --permute" if basis.get("permute") else ""
    options += f" --rotation-steps {basis['rotation_steps']}" if basis.get("rotation_steps") else ""
    options += " --keep-zeros" if calibration.get("keep_zeros") else ""
    if calibration.get("recovery_epochs"):
        options += f" --recovery-epochs {calibration['recovery_epochs']}"
        options += f" --recovery-learning-rate {calibration['recovery_learning_rate']:g}"
    return options + (f" --slorb-k {slorb['k']}" if slorb else "")


def _making(subject: Subject, report: ExportReport) -> Iterator[str]:
    record, method = subject.record, subject.record.get("one_shot", "method")
    config = record.get("run", "config")
    commands = [] if config is None else ["ast-train --config run.yaml  # below"]
    if method is not None:
        base = shlex.quote(subject.base or "MODEL")
        options = _prune_options(record.get("one_shot"))
        if subject.folder is None:  # ast-prune itself wrote these files
            options = f" --dtype {report.dtype}{options}"
        commands.append(f"ast-prune {base} OUT --method {method} --pattern {report.pattern}{options}")
    if subject.folder is not None:
        source = shlex.quote(shareable(str(subject.folder)))
        commands.append(
            f"ast-export {source} OUT --format {report.format} --dtype {report.dtype}{_options(subject, report)}"
        )
    if commands:
        yield _block("bash", commands)
    if subject.folder is None and method is None:
        text = ", samples=samples" if "--samples" in _options(subject, report) else ""
        call = f'"OUT", format="{report.format}", dtype="{report.dtype}"{text}'
        trained = isinstance(record.get("sparsity"), dict)
        yield _block("python", [f"trainer.export({call})" if trained else f"export_model(model, {call})"])
    if config is None:
        config = {key: record.get(key) for key in ("sparsity", "slorb", "distillation", "one_shot") if record.get(key)}
        config = shareable_values(config)
    if config:
        title = "run.yaml, the settings of the run without its prompts" if record.get("run") else "Settings"
        yield f"<details>\n<summary>{title}</summary>\n\n{_block('yaml', dump_yaml(config).splitlines())}\n\n</details>"
    trained_with = record.get("ast_sparse_version")
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    yield f"Exported with {made}." + (f" Trained with ast_sparse {trained_with}." if trained_with else "")


def _options(subject: Subject, report: ExportReport) -> str:
    """Options of ast-export beside format and dtype, with a space in front; empty if there are none."""
    options = ""
    if report.merge is not None:
        options += f" --merge-adapter {shlex.quote(_merged(subject.record)[-1])}"
    codec, done = codecs().get(report.format), subject.record.get("rounding")
    if codec is not None and codec.round is not None and isinstance(done, Mapping):
        text = f"TEXT --samples {done.get('sequences')} --seq-len {done.get('seq_len')}"
        options += f" --calibration {text if done.get('method') == 'awq' else 'none'}"
    return options


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _code(text: str) -> str:
    """A name for a code span in a table."""
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")


def _code_span(text: str) -> str:
    return f"`{_code(text)}`"


def _plain(text: str) -> str:
    """A text without the marks of Markdown."""
    return "".join(f"\\{each}" if each in "\\`*_[]<>|#" else each for each in " ".join(text.split()))
