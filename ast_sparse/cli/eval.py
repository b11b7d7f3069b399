"""ast-eval: perplexity of models on texts, KL divergence from a teacher, and tasks of the LM Evaluation Harness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ast_sparse.cli.command import Command
from ast_sparse.cli.options import check_json_file, find_device, write_json_file
from ast_sparse.cli.task_options import ONLY_TASKS, TaskSettings, find_harness, task_options
from ast_sparse.config.data import BOS_CHOICES
from ast_sparse.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ast_sparse.data.tokens.vocabulary import Renamed
    from ast_sparse.evaluation.harness import Harness
    from ast_sparse.evaluation.results import Results
    from ast_sparse.evaluation.texts import Text
    from ast_sparse.report.page import Report

WIKITEXT2 = "wikitext2"
_ONLY_WIKITEXT2 = ("split", "data_dir")
_ONLY_TEXTS = ("stride", "join", "bos", "by", "teacher", "bits_per_byte", "text_field", *_ONLY_WIKITEXT2)
_ONLY_REPORT = ("prompt",)
_JOINS = ("blank-line", "newline", "space", "none", "eos", "separate")  # of evaluation.windows, a slow import


@dataclass(frozen=True, kw_only=True)
class _Settings(TaskSettings):
    """The command line, parsed."""

    dataset: tuple[str, ...]
    split: str
    data_dir: str | None
    text_field: str
    by: str | None
    join: str | None
    seq_len: int | None
    stride: int | None
    bos: str
    limit: int | None
    teacher: str | None
    bits_per_byte: bool
    report: str | None
    prompt: tuple[str, ...]
    dtype: str | None
    device: str
    tokenizer: str | None
    revision: str | None
    gguf_file: str | None
    attn_implementation: str | None
    trust_remote_code: bool


@click.command(cls=Command)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--dataset",
    multiple=True,
    default=(WIKITEXT2,),
    metavar="wikitext2|c4|FILE",
    help="WikiText-2 (the default), C4, or a file of text, JSONL or parquet; repeatable, a row for each. In chat data "
    "(columns messages, or prompt and completion) only the assistant's text is predicted. C4 is the first 1100 "
    "documents of its first validation file, joined by a space, and 256 windows, as in the pruning literature.",
)
@click.option(
    "--split", type=click.Choice(["test", "validation"]), default="test", show_default=True,
    help="Split of WikiText-2; published results are on test.",
)  # fmt: skip
@click.option(
    "--data-dir", metavar="DIR", help="Folder with wiki.test.raw (wiki.valid.raw), or that file, instead of the hub."
)
@click.option("--text-field", default="text", show_default=True, help="Field with the text in a JSONL or parquet file.")
@click.option(
    "--by", metavar="FIELD",
    help="Group the documents of a file by this field (meta.domain: a field inside another): a row for each value, "
    "and one for all.",
)  # fmt: skip
@click.option(
    "--join", type=click.Choice(_JOINS),
    help="What is put between documents; eos: the end-of-text token; separate: no window crosses into another "
    "document. Default: blank-line, the published protocol; c4: space.",
)  # fmt: skip
@click.option(
    "--seq-len", type=click.IntRange(min=2),
    help="Tokens in a window. Default: the published window of the model's family (GPT-2 1024, OPT 2048, LLaMA2 4096, "
    "others 2048), at most the model's positions. If given, it is also the maximum length for tasks.",
)  # fmt: skip
@click.option(
    "--stride", type=click.IntRange(min=1),
    help="Tokens from the start of one window to the next; each window scores only its new tokens. Default: no "
    "overlap, the published protocol.",
)  # fmt: skip
@click.option(
    "--bos", type=click.Choice(BOS_CHOICES), default="auto", show_default=True,
    help="Where BOS is put. none: nowhere; document: before each document (before the whole text if documents are "
    "joined); window or block: before each window, counted in its length. auto: as the tokenizer does, the published "
    "protocol. BOS is never predicted. Gemma needs window. Prompts of --report get BOS unless this says none.",
)  # fmt: skip
@click.option(
    "--limit", type=click.IntRange(min=1),
    help="Maximum number of windows of a text, and of questions of a task; the first are used. Default: all.",
)  # fmt: skip
@click.option(
    "--teacher", metavar="MODEL",
    help="Show the mean KL(teacher || MODEL) in nats per token, and the share of tokens for which both have the same "
    "most likely token.",
)  # fmt: skip
@click.option("--bits-per-byte", is_flag=True, help="Show the loss in bits per UTF-8 byte; --json always has it.")
@task_options
@click.option(
    "--report",
    metavar="DIR",
    help="Write report.html in this folder, one page with all results, and its figures as PNG (needs "
    "ast-sparse[plots]). If a MODEL is the output of ast-train, it also shows the run: losses, perplexities, flip "
    "rates, domains.",
)
@click.option(
    "--prompt", multiple=True, metavar="TEXT", help="With --report: each MODEL continues this text; repeatable."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    help="Dtype of weights and activations; auto: the dtype of the checkpoint. Default: float32 on a CPU, auto on a "
    "GPU. The loss is always float32.",
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one."
)
@click.option("--json", "json_file", metavar="FILE", help="Write the results, settings and versions to this file too.")
@click.option("--tokenizer", metavar="MODEL", help="Use the tokenizer of this model. Default: each MODEL's own.")
@click.option("--revision", help="Branch, tag or commit of a MODEL on the hub.")
@click.option("--gguf-file", metavar="NAME", help="Name of the .gguf file inside a MODEL that is a folder or hub id.")
@click.option(
    "--attn-implementation", metavar="NAME", help="Attention of transformers: sdpa, eager, flash_attention_2, ..."
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a MODEL from the hub.")
@click.pass_context
def main(context: click.Context, models: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Measure each MODEL on texts or tasks and print a table.

    MODEL is a hub id, a local folder (dense, sparse checkpoint or export) or a .gguf file. A text is tokenised as a
    whole (--bos) and cut into windows that do not overlap; the perplexity is exp of the mean loss over all predicted
    tokens. A longer window gives a lower perplexity: compare only results with the same window.
    """
    settings = _Settings(**options)
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    has_texts = settings.tasks is None or "dataset" in given
    _check_options(settings, given, has_texts)
    if json_file is not None:
        check_json_file(Path(json_file))
    report = _report(settings, models)
    texts = _texts(settings) if has_texts else []
    harness = find_harness(settings)
    device = find_device(settings.device)
    if max(len(models), len(texts)) > 1 or settings.teacher is not None:  # else measuring finds the same errors at once
        _check_models(models, texts, settings)
    if settings.apply_chat_template is not None and harness is not None:
        for name in models:
            with _named_model(name):
                harness.prompts.template(_tokenizer(name, settings))
    teacher = None
    if settings.teacher is not None:
        teacher = _load(settings.teacher, device, settings, trust_remote_code=settings.trust_remote_code)
    from ast_sparse.evaluation.results import Results

    results = Results()
    try:
        for model in dict.fromkeys(models):
            _evaluate(results, model, texts, harness, teacher, device, settings, report)
    finally:  # an error in the last model does not lose the results of the first
        if results:
            click.echo(results.table(bits_per_byte=settings.bits_per_byte, teacher=teacher is not None))
    record = _record(results, device, settings)
    if json_file is not None:
        write_json_file(Path(json_file), record)
    if report is not None:
        _write_report(report, results, record)
    results.check()


def _check_options(settings: _Settings, given: set[str], has_texts: bool) -> None:
    for name in ONLY_TASKS if settings.tasks is None else ():
        if name in given:
            raise click.UsageError(f"--{name.replace('_', '-')} belongs to --tasks.")
    for name in _ONLY_REPORT if settings.report is None else ():
        if name in given:
            raise click.UsageError(f"--{name} belongs to --report.")
    for name in () if has_texts else _ONLY_TEXTS:
        if name in given:
            raise click.UsageError(f"--{name.replace('_', '-')} belongs to --dataset, not to --tasks alone.")
    for name in _ONLY_WIKITEXT2 if WIKITEXT2 not in settings.dataset else ():
        if name in given:
            raise click.UsageError(f"--{name.replace('_', '-')} belongs to --dataset {WIKITEXT2}, not to a file.")


def _texts(settings: _Settings) -> list[Text]:
    from ast_sparse.evaluation.texts import read_datasets

    return read_datasets(
        settings.dataset,
        split=settings.split,
        data_dir=settings.data_dir,
        text_field=settings.text_field,
        by=settings.by,
        join=settings.join,
    )


def _check_models(models: tuple[str, ...], texts: list[Text], settings: _Settings) -> None:
    """Find a wrong name, window or tokenizer before any weights are loaded."""
    from ast_sparse.data.tokens.chat import check_chat_tokenizer
    from ast_sparse.evaluation.perplexity import check_window, default_seq_len
    from ast_sparse.evaluation.teacher import check_teacher
    from ast_sparse.storage.locate import load_model_config
    from ast_sparse.storage.packed import decode_on_load

    teacher = None
    if settings.teacher is not None:
        teacher = load_model_config(settings.teacher, trust_remote_code=settings.trust_remote_code)
        decode_on_load(teacher, settings.teacher)
    for model in models:
        config = load_model_config(model, **_place(settings))
        decode_on_load(config, model)
        seq_len = settings.seq_len or default_seq_len(config)
        with _named_model(model):
            check_window(config, seq_len)
            for text in (text for text in texts if text.is_chat):
                check_chat_tokenizer(_tokenizer(model, settings), text.documents[0], text.name)
            if teacher is not None:
                name, trusted = str(settings.teacher), settings.trust_remote_code
                note = check_teacher(name, teacher, config, seq_len, _tokenizer(model, settings), trusted)
                if note is not None:
                    click.echo(f"Note: {note}.", err=True)


def _place(settings: _Settings) -> dict[str, Any]:
    return {
        "revision": settings.revision,
        "gguf_file": settings.gguf_file,
        "trust_remote_code": settings.trust_remote_code,
    }


def _load(name: str, device: torch.device, settings: _Settings, **place: Any) -> PreTrainedModel:
    import torch

    from ast_sparse.storage.load import load_causal_lm

    dtype = settings.dtype or ("float32" if device.type == "cpu" else "auto")
    model = load_causal_lm(
        name,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=settings.attn_implementation,
        **place,
    )
    module: torch.nn.Module = model
    module.to(device)
    return model


def _evaluate(
    results: Results,
    name: str,
    texts: list[Text],
    harness: Harness | None,
    teacher: PreTrainedModel | None,
    device: torch.device,
    settings: _Settings,
    report: Report | None,
) -> None:
    """Measure one model and add its results, and what the report shows about it."""
    from ast_sparse.data.tokens.bos import bos_note
    from ast_sparse.evaluation.measure import measure_texts
    from ast_sparse.evaluation.perplexity import default_seq_len

    tokenizer = _tokenizer(name, settings)
    renamed = {} if settings.teacher is None else _check_tokens(tokenizer, texts, settings)
    if texts and (note := bos_note(settings.bos, tokenizer)) is not None:
        click.echo(f"Note: {name}: {note}", err=True)
    model = _load(name, device, settings, **_place(settings))
    dtype = str(model.dtype).removeprefix("torch.")
    with _named_model(name):
        seq_len = settings.seq_len or default_seq_len(model.config)
        options: dict[str, Any] = {"stride": settings.stride, "bos": settings.bos}
        options |= {"teacher": teacher, "renamed": renamed}
        for label, result in measure_texts(model, tokenizer, texts, seq_len, settings.limit, **options):
            results.texts.append((name, label, dtype, result))
        if harness is not None:
            rows = harness(
                model,
                tokenizer,
                limit=settings.limit,
                batch_size=settings.batch_size,
                max_length=settings.seq_len,
            )
            results.tasks += [(name, dtype, row) for row in rows]
        if report is not None:
            report.add(name, model, tokenizer, settings.prompt, settings.bos)


@contextmanager
def _named_model(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _tokenizer(name: str, settings: _Settings) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer`, or the model's own."""
    from ast_sparse.storage.locate import load_tokenizer

    if settings.tokenizer:
        return load_tokenizer(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
    return load_tokenizer(name, **_place(settings))


def _check_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[Text], settings: _Settings) -> Renamed:
    """The tokens that must not occur in the text, as in `renamed_tokens`."""
    from ast_sparse.data.tokens.vocabulary import renamed_tokens
    from ast_sparse.evaluation.measure import check_tokens
    from ast_sparse.storage.locate import load_tokenizer

    assert settings.teacher is not None
    try:
        other = load_tokenizer(settings.teacher, trust_remote_code=settings.trust_remote_code)
    except UserError:  # the model's own tokenizer is used
        return {}
    for text in texts:
        check_tokens(tokenizer, other, text.documents, f"--teacher {settings.teacher}")
    return renamed_tokens(tokenizer, other)


def _report(settings: _Settings, models: tuple[str, ...]) -> Report | None:
    """The page to fill; it already has the records of those models that are the output of a run."""
    if settings.report is None:
        return None
    from ast_sparse.report.page import Report, check_report

    check_report(Path(settings.report).expanduser(), "--report")
    if not all(prompt.strip() for prompt in settings.prompt):
        raise UserError("--prompt is empty. Give it text, or remove it.")
    return Report.of(list(dict.fromkeys(models)))


def _write_report(report: Report, results: Results, record: dict[str, Any]) -> None:
    from ast_sparse.report.page import write_report

    settings = record["settings"]
    report.results = results
    report.made_with = {**record["versions"], "device": settings["device"]}
    page = write_report(Path(settings["report"]).expanduser(), report)
    click.echo(f"Wrote {page}")


def _record(results: Results, device: torch.device, settings: _Settings) -> dict[str, Any]:
    from importlib.metadata import version

    from ast_sparse.storage.versions import versions

    made_with = versions()
    record: dict[str, Any] = {
        **results.record(),
        "settings": {**asdict(settings), "device": str(device)},
        "versions": made_with,
    }
    if len(settings.dataset) == 1:
        record["settings"]["dataset"] = settings.dataset[0]
    if settings.tasks is not None:
        made_with["lm_eval"] = version("lm-eval")
    return record


if __name__ == "__main__":
    main()
