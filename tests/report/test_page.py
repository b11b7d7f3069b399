"""The report: one valid page that needs nothing else, what it shows, and what it is made of."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ast_sparse.config import SparsityConfig, load_config
from ast_sparse.errors import UserError
from ast_sparse.evaluation.harness import TaskResult
from ast_sparse.evaluation.measure import TextResult, measure_text
from ast_sparse.evaluation.results import Results
from ast_sparse.evaluation.samples import continue_prompts
from ast_sparse.export.export import export_model
from ast_sparse.report.curves import draw_runs, layer_place
from ast_sparse.report.overview import layer_counts, model_rows, short_names, stored_counts, weight_bytes
from ast_sparse.report.page import Report, run_report, write_report
from ast_sparse.run.train import run_training
from ast_sparse.sparsity.model import sparse_layers, sparsify_model
from ast_sparse.storage.load import load_causal_lm
from ast_sparse.storage.locate import load_tokenizer
from ast_sparse.storage.run_folder import Run, is_run, read_run
from tests.export.sparse_models import sparse_model
from tests.models import generated_text, save_tiny_model, tiny_model, tiny_tokenizer

EMPTY = {"meta", "img", "br"}
PROMPT = "the <b>sparse & model"


class Checker(HTMLParser):
    """Collects what is wrong with a page: tags that do not match, and anything it would have to fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "link", "iframe", "b"):
            self.faults.append(tag)
        if tag == "img":
            self.images.append(values)
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(page: Path) -> Checker:
    text = page.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert text.startswith("<!DOCTYPE html>") and not checker.open and not checker.faults
    assert not re.search(r"""(?:href|src)=["'](?!data:)|url\(|@import|https?://""", text)
    return checker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that ends in a report."""
    root = tmp_path_factory.mktemp("page")
    save_tiny_model(root / "model")
    (root / "text.txt").write_text(generated_text())
    tree = {
        "model": {"name_or_path": str(root / "model")},
        "data": {"root": str(root), "train": ["text.txt"], "eval_share": 0.1, "block_size": 32},
        "sparsity": {"mask_interval": 2},
        "training": {
            "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "eval_strategy": "steps",
            "eval_steps": 3, "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True, "save_steps": 4,
        },
        "evaluation": {
            "datasets": ["heldout", "text.txt"], "seq_len": 32, "windows": 3, "steps": 2, "report": True,
            "prompts": [PROMPT],
        },
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    run_training(load_config(root / "run.yaml"), str(root / "run"), echo=lambda line: None)
    return root


def test_a_run_ends_in_a_page_that_needs_nothing_else(folder: Path) -> None:
    place = folder / "run" / "report"
    page = checked(place / "report.html")
    names = {path.stem: path.read_bytes() for path in place.glob("*.png")}
    assert names.keys() == {"losses", "flips", "layer_flips", "density"}
    inline = [base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) for image in page.images]
    assert sorted(inline) == sorted(names.values()) and all(image["alt"] for image in page.images)
    for text in ("dense", "one-shot 2:4", "retrained 2:4", "50.0%", PROMPT, "mask decay λ"):
        assert text in page.text


def test_each_stage_continues_the_prompts_as_a_plain_loop_does(folder: Path) -> None:
    samples = json.loads((folder / "run" / "samples.json").read_text())
    assert list(samples) == ["dense", "one-shot 2:4", "retrained 2:4"]
    tokenizer = tiny_tokenizer()
    for stage, model in (("dense", tiny_model()), ("retrained 2:4", load_causal_lm(folder / "run"))):
        tokens = tokenizer(PROMPT)["input_ids"]
        start = len(tokens)
        while len(tokens) < start + 48 and tokenizer.eos_token_id not in tokens[start:]:
            with torch.no_grad():
                tokens = [*tokens, int(model.double()(torch.tensor([tokens])).logits[0, -1].argmax())]
        assert samples[stage] == {PROMPT: tokenizer.decode(tokens[start:], skip_special_tokens=True)}


def test_a_prompt_that_cannot_be_continued_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--prompt: 'the the.* … has \d+ tokens, the model has 128 positions"):
        continue_prompts(tiny_model(), tiny_tokenizer(), ["the " * 200], "--prompt")
    with pytest.raises(UserError, match="--prompt: '' has no tokens"):
        continue_prompts(tiny_model(), tiny_tokenizer(), [""], "--prompt")


def test_the_likeliest_tokens_are_taken_whatever_the_model_says_about_generation() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    expected = continue_prompts(model, tokenizer, [PROMPT])
    model.generation_config.repetition_penalty = 5.0
    assert continue_prompts(model, tokenizer, [PROMPT]) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_a_stage_that_was_measured_again_is_one_row(folder: Path) -> None:
    models = [str(folder / "model"), str(folder / "run"), str(folder / "other")]
    export_model(folder / "run", folder / "other", "compressed")
    report = Report.of(models)
    text, tokenizer = generated_text(), tiny_tokenizer()
    for name in models:
        model = load_causal_lm(name)
        result = measure_text(model, tokenizer, [text], 32, 3, progress=False)
        report.results.texts.append((name, "text.txt", "float32", result))
        report.add(name, model, load_tokenizer(name))
    rows = model_rows(report.runs, report.results.texts, report.names, report.counts, report.samples)
    kinds = ["dense", "one-shot 2:4", "retrained 2:4", "compressed 2:4"]
    assert [row.kind for row in rows] == kinds and [row.name for row in rows] == ["model", "model", "run", "other"]
    assert [row.zeros for row in rows] == [0.0, None, 0.5, 0.5]
    assert all(list(row.samples) == [PROMPT] for row in rows)
    stages = read_run(folder / "run").stages
    for row, stage in zip(rows, stages, strict=False):
        found = {protocol.text: value for protocol, value in row.perplexities.items()}
        assert found == pytest.approx({name: figures["perplexity"] for name, figures in stages[stage].items()})
    assert rows[2].size == (folder / "run" / "model.safetensors").stat().st_size


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    name = 'a<script>"&'
    row = TaskResult(task="t<b>", num_fewshot=0, metric="acc", value=0.5, stderr=0.01, examples=4, shown=True)
    report = Report(names={name: name}, results=Results(tasks=[(name, "float32", row)]), made_with={"<b>": "&"})
    report.samples = {name: {"<b>": "</p><script>"}}
    page = checked(write_report(tmp_path, report))
    assert name in page.text and "t<b>" in page.text and "</p><script>" in page.text and "0.5000 ± 0.0100" in page.text


def test_figures_of_an_earlier_report_go(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "domains_2.png").write_bytes(b"old")
    (tmp_path / "mine.png").write_bytes(b"mine")
    write_report(tmp_path, run_report(folder / "run"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "density.png", "flips.png", "layer_flips.png", "losses.png", "mine.png", "report.html",
    }  # fmt: skip


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match=r"The report cannot be written to .*: disk full"):
        write_report(tmp_path, run_report(folder / "run"))
    assert (tmp_path / "report.html").read_text() == "old" and not list(tmp_path.glob(".*"))


def recorded(folder: Path, log: list[dict[str, float]], history: list[dict[str, object]]) -> Run:
    return Run(folder=folder, config={}, stages={}, log=log, history=history, samples={})


def test_domains_have_a_line_each_for_shares_and_losses(tmp_path: Path) -> None:
    log = [{"step": s, "domain_share/cc": 0.5 + s / 100, "domain_share/wiki": 0.5 - s / 100} for s in (0, 10)]
    log += [{"step": s, "eval_cc_loss": 3.0 - s / 10, "eval_cc_perplexity": 9.0} for s in (0, 10)]
    log += [{"step": s, "eval_wiki_loss": 2.0, "domain_loss/wiki": 2.5} for s in (0, 10)]
    (picture,) = draw_runs({"a": recorded(tmp_path, log, [])})
    assert picture.name == "domains"
    shares, trained, losses = picture.figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in shares.lines}
    assert lines == {"cc": pytest.approx([50, 60]), "wiki": pytest.approx([50, 40])}
    assert [list(line.get_ydata()) for line in losses.lines] == [[3.0, 2.0], [2.0, 2.0]]
    assert [list(line.get_ydata()) for line in trained.lines] == [[], [2.5, 2.5]]


def test_flips_by_layer_are_means_over_the_blocks(tmp_path: Path) -> None:
    history = [
        {"step": step, "flip_rate": 0.1, "initial_flip_rate": 0.1, "layers": {
            "model.layers.0.mlp.up": [0.2 / step, 0.1], "model.layers.1.mlp.up": [0.4 / step, 0.3],
        }}
        for step in (1, 2)
    ]  # fmt: skip
    pictures = {picture.name: picture for picture in draw_runs({"a": recorded(tmp_path, [], history)})}
    assert pictures.keys() == {"flips", "layer_flips"}
    left, right = (axes.images[0].get_array() for axes in pictures["layer_flips"].figure.axes[:2])
    assert left.tolist() == [pytest.approx([30, 15])] and right.tolist() == [pytest.approx([10, 30])]
    assert layer_place("model.layers.3.mlp.experts.7.up") == ("mlp.experts.*.up", 3)


def test_perplexities_that_span_decades_stand_on_a_logarithmic_axis(tmp_path: Path) -> None:
    log = [{"step": step, "heldout_perplexity": value} for step, value in ((1, 3000.0), (2, 30.0))]
    (picture,) = draw_runs({"a": recorded(tmp_path, log, [])})
    assert [axes.get_yscale() for axes in picture.figure.axes] == ["log"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_counts_are_those_of_the_masks(family: str, tmp_path: Path) -> None:
    model = sparse_model(family, slorb_k=8)
    layers = sparse_layers(model)
    expected = {name: (int(layer.mask.sum()), layer.mask.numel()) for name, layer in layers.items()}
    for format in ("dense", "compressed"):
        export_model(model, tmp_path / format, format, dtype="float32", tokenizer=tiny_tokenizer())
        assert layer_counts(load_causal_lm(tmp_path / format)) == expected  # SLoRB's matrices are no layers
    assert stored_counts(tmp_path / "dense") == expected
    files = [*(tmp_path / "dense").glob("*.safetensors"), *(tmp_path / "dense" / "slorb").glob("*.safetensors")]
    assert weight_bytes(str(tmp_path / "dense")) == sum(file.stat().st_size for file in files)


def test_texts_of_different_length_are_no_common_column(tmp_path: Path) -> None:
    figures = {"perplexity": 9.0, "seq_len": 32, "windows": 3, "predicted_tokens": 93}
    runs = {}
    for name, total in (("a", 100), ("b", 200)):
        stages = {"retrained 2:4": {"heldout": {**figures, "total_tokens": total}}}
        runs[name] = Run(folder=tmp_path / name, config={}, stages=stages, log=[], history=[], samples={})
    rows = model_rows(runs, [], {}, {}, {})
    columns = [str(protocol) for row in rows for protocol in row.perplexities]
    assert columns == ["heldout, 3 × 32 of 100 tokens", "heldout, 3 × 32 of 200 tokens"]


def test_text_that_begins_or_is_joined_otherwise_is_another_column(tmp_path: Path) -> None:
    figures = {"seq_len": 32, "windows": 3, "predicted_tokens": 93, "total_tokens": 100}
    of_run = {"perplexity": 9.0, "join": "blank-line", "bos": "none", **figures}
    run = Run(folder=tmp_path, config={}, stages={"retrained 2:4": {"a.txt": of_run}}, log=[], history=[], samples={})
    texts = []
    for perplexity, join, bos in ((8.0, "blank-line", "window"), (7.0, "newline", "none"), (9.0, "blank-line", "none")):
        rest: dict[str, Any] = dict.fromkeys(("stride", "scored_bytes", "bits_per_byte", "teacher_kl"))
        result = TextResult(
            perplexity=perplexity, mean_nll=2.0, seconds=1.0, join=join, bos=bos, all_windows=3, documents=1,
            teacher_agreement=None, **figures, **rest,
        )  # fmt: skip
        texts.append((str(tmp_path), "a.txt", "float32", result))
    (row,) = model_rows({"run": run}, texts, {str(tmp_path): "run"}, {}, {})
    assert {str(protocol): value for protocol, value in row.perplexities.items()} == {
        "a.txt, 3 × 32 of 100 tokens": 9.0,
        "a.txt, 3 × 32 of 100 tokens, BOS in every window": 8.0,
        "a.txt, 3 × 32 of 100 tokens, join newline": 7.0,
    }


def test_results_of_versions_that_recorded_no_bos_share_the_columns_of_newer_ones(tmp_path: Path) -> None:
    figures = {"perplexity": 9.0, "seq_len": 32, "windows": 3, "predicted_tokens": 93, "total_tokens": 100}

    def columns(bos: str | None) -> list[str]:
        new = {**figures, "join": "blank-line", "bos": {"block": "window"}.get(str(bos), bos or "none")}
        stages = ({"wikitext2": figures, "heldout": figures}, {"wikitext2": new, "heldout": {**figures, "bos": None}})
        config = {"data": {} if bos is None else {"bos": bos}}
        empty: dict[str, Any] = {"config": config, "log": [], "history": [], "samples": {}}
        runs = {
            str(number): Run(folder=tmp_path / str(number), stages={"retrained 2:4": stage}, **empty)
            for number, stage in enumerate(stages)
        }
        found = dict.fromkeys(protocol for row in model_rows(runs, [], {}, {}, {}) for protocol in row.perplexities)
        return list(map(str, found))

    text, held_out = (f"{name}, 3 × 32 of 100 tokens" for name in ("wikitext2 test", "heldout"))
    assert columns(None) == columns("none") == [text, held_out]
    assert columns("document") == [f"{text}, BOS first", held_out]
    assert columns("block") == [f"{text}, BOS in every window", held_out]


def test_other_prompts_stand_beside_those_that_the_run_has_recorded(tmp_path: Path) -> None:
    samples = {stage: {"a": f"of {stage}"} for stage in ("one-shot 2:4", "retrained 2:4")}
    run = Run(folder=tmp_path, config={}, stages={name: {} for name in samples}, log=[], history=[], samples=samples)
    rows = model_rows({"run": run}, [], {str(tmp_path): "run"}, {}, {str(tmp_path): {"b": "new"}})
    assert [row.samples for row in rows] == [{"a": "of one-shot 2:4"}, {"a": "of retrained 2:4", "b": "new"}]


def test_layers_that_are_not_pruned_are_counted_too(tmp_path: Path) -> None:
    model = tiny_model()
    sparsify_model(model, SparsityConfig(exclude=("*.down_proj",)))
    export_model(model, tmp_path, "dense", dtype="float32", tokenizer=tiny_tokenizer())
    counts = stored_counts(tmp_path)
    assert counts == layer_counts(load_causal_lm(tmp_path))
    kept, total = counts["model.layers.0.mlp.down_proj"]
    assert kept == total > 0


def test_weights_that_a_folder_has_twice_count_once(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "consolidated.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert weight_bytes(str(tmp_path)) == size and weight_bytes(str(tmp_path / "none")) is None


def test_prompts_are_continued_with_the_bos_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("ast_sparse.evaluation.samples.continue_prompts", lambda *given: asked.append(given[2:]) or {})
    Report().add("a", tiny_model(), tiny_tokenizer(), ["x"], "window")
    assert asked == [(["x"], "--prompt", "window")]


def test_settings_without_effect_are_not_shown(tmp_path: Path) -> None:
    config = {"sparsity": {"schedule": "gmp", "mask_decay": 6e-5}, "slorb": {"enabled": False, "k": 16}}
    run = Run(folder=tmp_path, config=config, stages={}, log=[], history=[], samples={})
    text = checked(write_report(tmp_path / "report", Report(runs={"a": run}))).text
    assert "optimizer steps" in text and "SLoRB k" not in text and "mask decay" not in text


def test_names_are_as_long_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_names(["/a/one/model", "."]) == {"/a/one/model": "model", ".": tmp_path.name}
    names = short_names(["/a/one/model", "/a/two/model", "org/name"])
    assert names == {"/a/one/model": "one/model", "/a/two/model": "two/model", "org/name": "name"}


def test_a_cut_record_is_read_and_a_damaged_one_named(folder: Path, tmp_path: Path) -> None:
    assert is_run(folder / "run") and not is_run(folder / "model")
    for name in ("config.yaml", "metrics.jsonl", "results.json"):
        (tmp_path / name).write_bytes((folder / "run" / name).read_bytes())
    rows = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(rows[:-9])
    assert read_run(tmp_path).log == read_run(folder / "run").log[:-1]
    (tmp_path / "metrics.jsonl").write_text("[]\n" + rows)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: it has no step"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(rows)
    (tmp_path / "results.json").write_text('{"dense": 5}')
    with pytest.raises(UserError, match=r"results\.json`: 'dense' holds no results"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text('{"dense": {"heldout": {"perplexity": 5, "seq_len": "x"}}}')
    with pytest.raises(UserError, match=r"results\.json`: dense, 'heldout'\. Restore"):
        read_run(tmp_path)
