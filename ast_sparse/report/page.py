"""The report as one HTML page without other files: tables, inline figures, continuations side by side."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ast_sparse.config import EvaluationConfig
from ast_sparse.errors import UserError
from ast_sparse.evaluation.results import Results
from ast_sparse.report.overview import (
    Counts,
    ModelRow,
    Protocol,
    layer_counts,
    model_rows,
    short_names,
    stored_counts,
)
from ast_sparse.storage.run_folder import Run, is_run, read_run
from ast_sparse.tables import shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ast_sparse.report.curves import Picture

PAGE = "report.html"
_PICTURES = ("losses", "flips", "layer_flips*", "domains*", "density")  # files of an earlier report
_PIXELS = 108  # per inch of a figure: the widest figure, 8.6 inches, fills the page
_SETTINGS = (
    ("model", ("model", "name_or_path")),
    ("pattern", ("sparsity", "pattern")),
    ("start masks", ("sparsity", "init")),
    ("steps between mask refreshes", ("sparsity", "mask_interval")),
    ("mask decay λ", ("sparsity", "mask_decay")),
    ("decay schedule", ("sparsity", "decay_schedule")),
    ("decay placement", ("sparsity", "decay_placement")),
    ("distillation", ("distillation", "kind")),
    ("α of the distillation", ("distillation", "alpha")),
    ("SLoRB k", ("slorb", "k")),
    ("learning rate", ("training", "learning_rate")),
    ("tokens of a block", ("data", "block_size")),
)


@dataclass(kw_only=True)
class Report:
    """The content of a page.

    Attributes:
        runs: by the name they are shown under.
        names: the measured models, and the names they are shown under.
        results: the results of these models.
        counts: weights that are not zero, by measured model.
        samples: continuations by measured model, by prompt.
        made_with: versions and the like, for the foot of the page.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    results: Results = field(default_factory=Results)
    counts: dict[str, Counts] = field(default_factory=dict)
    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, models: Sequence[str]) -> Report:
        """A report on models, with the records of those that are the output of a run.

        Raises:
            UserError: a file of such a record is damaged.
        """
        names = short_names(models)
        folders = {model: Path(model).expanduser() for model in models}
        runs = {names[model]: read_run(folder) for model, folder in folders.items() if is_run(folder)}
        return cls(runs=runs, names=names)

    def add(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str] = (),
        bos: str = "auto",
    ) -> None:
        """Count the weights of a model, and let it continue the prompts; by default, those of the runs.

        Args:
            bos: as for `continue_prompts`.

        Raises:
            UserError: a prompt that cannot be continued.
        """
        from ast_sparse.evaluation.samples import continue_prompts

        recorded = [prompt for run in self.runs.values() for texts in run.samples.values() for prompt in texts]
        self.counts[name] = layer_counts(model)
        chosen = prompts or tuple(dict.fromkeys(recorded)) or EvaluationConfig().prompts
        self.samples[name] = continue_prompts(model, tokenizer, chosen, "--prompt", bos)


def run_report(folder: Path) -> Report:
    """The report on a finished run, from its records and the weights it saved."""
    from ast_sparse.storage.versions import versions

    run, name = read_run(folder), short_names([str(folder)])[str(folder)]
    trusted = bool(run.setting("model", "trust_remote_code"))
    return Report(
        runs={name: run},
        names={str(folder): name},
        counts={str(folder): stored_counts(folder, trusted)},
        made_with=versions(),
    )


def check_report(out: Path, field: str) -> None:
    """Check that figures can be drawn and the folder can be written, before anything is measured.

    Args:
        field: the setting that asks for the report, for messages.

    Raises:
        UserError: matplotlib is missing, or `out` is a file or cannot be written to.
    """
    if find_spec("matplotlib") is None:
        raise UserError(f"{field} needs matplotlib for its figures. Install it: pip install 'ast-sparse[plots]'.")
    if out.suffix == ".html":
        raise UserError(f"{field} {out} ends in .html. Name a folder for {PAGE} and its figures.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{field} {out} is a file. Name a folder.")
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK) or not above.is_dir():
        raise UserError(f"{field} {out}: {above} cannot be written to. Name another folder.")


def write_report(out: Path, report: Report) -> Path:
    """Write the page, and its figures as PNG next to it; files of an earlier report are replaced.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder cannot be written.
    """
    from ast_sparse.report import plots
    from ast_sparse.report.curves import draw_density, draw_runs

    names = {model: report.names.get(model, model) for model in report.counts}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for pattern in _PICTURES:
            for stale in out.glob(f"{pattern}.png"):
                stale.unlink()
        with plots.styled():
            pictures = draw_runs(report.runs)
            if density := draw_density({names[model]: counts for model, counts in report.counts.items()}):
                pictures.append(density)
            for picture in pictures:
                plots.save(picture.figure, out / f"{picture.name}.png")
        page, temporary = out / PAGE, out / f".{PAGE}.{os.getpid()}.tmp"
        try:
            temporary.write_text(_page(report, pictures, out), encoding="utf-8")
            temporary.replace(page)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"The report cannot be written to {out}: {error.strerror or error}.") from error
    return page


def _page(report: Report, pictures: Sequence[Picture], out: Path) -> str:
    rows = model_rows(report.runs, report.results.texts, report.names, report.counts, report.samples)
    samples = _continuations(rows)
    sections = [
        _section("Models", _models_table(rows), _MODELS_NOTE),
        _section("Tasks", _tasks_table(report)) if report.results.tasks else "",
        _section("Results on every text", _texts_table(report)) if report.results.texts else "",
        _section("Training", _settings_table(report.runs)) if report.runs else "",
        *(_figure(picture, out) for picture in pictures),
        _section("Continuations", samples, _SAMPLES_NOTE) if samples else "",
        _section("Made with", _made_with(report.made_with)) if report.made_with else "",
    ]
    names = list(dict.fromkeys((*report.runs, *report.names.values())))
    title = "ast_sparse report: " + ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
    body = "\n".join(section for section in sections if section)
    return _FRAME.format(title=escape(title), style=_STYLE, body=body)


def _section(title: str, content: str, note: str = "") -> str:
    after = f'\n<p class="note">{escape(note)}</p>' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}{after}\n</section>"


def _table(headers: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """A table; the first `words` columns are text, the others right-aligned numbers."""
    kinds = ["" if column < words else ' class="number"' for column in range(len(headers))]
    head = "".join(f'<th scope="col"{kind}>{escape(header)}</th>' for header, kind in zip(headers, kinds, strict=True))
    lines = []
    for first, *others in rows:
        cells = [f'<th scope="row">{escape(shown(first))}</th>']
        cells += [f"<td{kind}>{escape(shown(cell))}</td>" for cell, kind in zip(others, kinds[1:], strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _models_table(rows: Sequence[ModelRow]) -> str:
    protocols = list(dict.fromkeys(protocol for row in rows for protocol in row.perplexities))
    headers = ["model", "what it is", "zeros in the blocks", "size on disk"]
    lines = [
        [
            row.name,
            row.kind,
            None if row.zeros is None else f"{row.zeros:.1%}",
            None if row.size is None else f"{row.size / 1e6:,.1f} MB",
            *(_perplexity(row, protocol) for protocol in protocols),
        ]
        for row in rows
    ]
    return _table([*headers, *(f"perplexity: {protocol}" for protocol in protocols)], lines, words=2)


def _perplexity(row: ModelRow, protocol: Protocol) -> str | float | None:
    if protocol not in row.perplexities:
        return None
    value = row.perplexities[protocol]
    return "not finite" if value is None else float(value)


def _tasks_table(report: Report) -> str:
    """Results of tasks: a row for each task, a column for each model."""
    models = list(dict.fromkeys(model for model, _, _ in report.results.tasks))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for model, _, task in report.results.tasks:
        if task.shown:
            error = "" if task.stderr is None else f" ± {task.stderr:.4f}"
            key = (task.task, task.prompt or "plain text", shown(task.num_fewshot), shown(task.examples), task.metric)
            cells.setdefault(key, {})[model] = f"{task.value:.4f}{error}"
    headers = [
        "task",
        "prompt",
        "few-shot",
        "examples",
        "metric",
        *(report.names.get(model, model) for model in models),
    ]
    return _table(headers, [[*key, *(values.get(model) for model in models)] for key, values in cells.items()])


def _texts_table(report: Report) -> str:
    headers = ["model", "text", "dtype", "join", "BOS", "window", "stride", "windows", "predicted tokens", "perplexity"]
    headers += ["bits per byte", "KL to teacher (nats per token)", "top-1 agreement"]
    rows = []
    for model, text, dtype, result in report.results.texts:
        windows = f"{result.windows:,}" + (f" of {result.all_windows:,}" if result.windows < result.all_windows else "")
        rows.append([
            report.names.get(model, model), text, dtype, result.join, result.bos, result.seq_len, result.stride,
            windows, result.predicted_tokens, result.perplexity,
            _decimals(result.bits_per_byte), _decimals(result.teacher_kl),
            None if result.teacher_agreement is None else f"{result.teacher_agreement:.1%}",
        ])  # fmt: skip
    used = [index for index in range(len(headers)) if any(row[index] is not None for row in rows)]
    return _table([headers[index] for index in used], [[row[index] for index in used] for row in rows], words=5)


def _decimals(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _settings_table(runs: Mapping[str, Run]) -> str:
    """Settings and length of the runs, a column for each."""
    lines: list[list[Any]] = [[title, *(_setting(run, *path) for run in runs.values())] for title, path in _SETTINGS]
    lines.append(["optimizer steps", *(max((row["step"] for row in run.log), default=0) for run in runs.values())])
    speeds = [[value for _, value in run.logged("tokens_per_second")] for run in runs.values()]
    lines.append(
        ["tokens per second, median", *(round(sorted(each)[len(each) // 2]) if each else None for each in speeds)]
    )
    lines = [line for line in lines if any(cell is not None for cell in line[1:])]
    return _table(["setting", *runs], lines, words=1)


def _setting(run: Run, section: str, key: str) -> str | None:
    """None if it is not set, or if the run does not use it."""
    value = run.setting(section, key)
    is_gradual = run.setting("sparsity", "schedule") in ("imp", "gmp")  # they have no mask decay
    has_no_use = {"slorb": run.setting("slorb", "enabled") is False, "sparsity": is_gradual and "decay" in key}
    if value is None or has_no_use.get(section, False):
        return None
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _figure(picture: Picture, out: Path) -> str:
    data = base64.b64encode((out / f"{picture.name}.png").read_bytes()).decode()
    width = round(_PIXELS * picture.figure.get_figwidth())  # so that text has the same size in all figures
    return (
        f"<section>\n<h2>{escape(picture.title)}</h2>\n<figure>\n"
        f'<img src="data:image/png;base64,{data}" alt="{escape(picture.title)}" width="{width}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>\n</section>"
    )


def _continuations(rows: Sequence[ModelRow]) -> str:
    """For each prompt, a card for every model that continued it."""
    parts = []
    for prompt in dict.fromkeys(prompt for row in rows for prompt in row.samples):
        cards = "\n".join(
            f'<div class="card"><h4>{escape(row.name)} <span class="kind">{escape(row.kind)}</span></h4>'
            f'<p><span class="prompt">{escape(prompt)}</span>{escape(row.samples[prompt])}</p></div>'
            for row in rows
            if prompt in row.samples
        )
        parts.append(f'<h3>{escape(prompt)} …</h3>\n<div class="cards">\n{cards}\n</div>')
    return "\n".join(parts)


def _made_with(made_with: Mapping[str, Any]) -> str:
    return _table(["name", "value"], [[name, str(value)] for name, value in made_with.items()], words=2)


_MODELS_NOTE = (
    "Perplexities in one column are comparable; those in different columns are not: a longer window gives a lower "
    "perplexity. Zeros are counted in the linear layers of the decoder blocks; the size is that of the weight files."
)
_SAMPLES_NOTE = "Greedy continuations, without a chat template. The prompt is grey."
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, "Liberation Sans", "DejaVu Sans", sans-serif; color: #111; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } h4 { font-size: .85rem; margin: 0 0 .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ccc; }
thead th { border-bottom: 2px solid #111; max-width: 11rem; vertical-align: bottom; }
tbody th { font-weight: 600; overflow-wrap: break-word; max-width: 18rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.note, figcaption { font-size: .85rem; color: #333; max-width: 46rem; }
figure { margin: 0; } img { max-width: 100%; height: auto; display: block; margin-bottom: .5rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .8rem; }
.card { box-sizing: border-box; min-width: 0; border: 1px solid #ccc; padding: .6rem .7rem; break-inside: avoid; }
.card p { margin: 0; font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: #666; } .kind { font-weight: normal; }
@page { margin: 15mm; }
@media print {
  body { font-size: 10pt; margin: 0; padding: 0 1mm; max-width: none; }
  h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; } .wide { overflow: visible; }
}
"""
_FRAME = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
