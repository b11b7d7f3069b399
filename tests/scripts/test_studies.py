"""scripts/studies/run.py: variants are run once, resumed or refused; one table, its provenance, and figures."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ast_sparse.config import load_config
from ast_sparse.run.train import run_training
from scripts.studies.run import main
from scripts.studies.variants import read_study
from tests.models import generated_text, save_tiny_model
from tests.processes import forked_commands

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHIPPED = {
    "table1", "table4", "table5", "table9", "table11", "table12", "table13", "table14", "patterns", "fig2", "fig4",
    "recipes",
}  # fmt: skip
PNG = b"\x89PNG"
BASE = """
model: {{name_or_path: {place}/model}}
data: {{root: {place}, train: [text.txt], eval_share: 0.1, block_size: 32}}
sparsity: {{mask_interval: 1}}
training: {{max_steps: 3, per_device_train_batch_size: 2, logging_steps: 1, save_steps: 2, seed: 5, use_cpu: true}}
evaluation: {{datasets: [heldout, wikitext2], seq_len: 32, windows: 3, data_dir: {place}}}
"""
STUDY = """
title: Tiny
config: base.yaml
smoke: {evaluation.windows: 2}
figures: [perplexity, flips, losses, alpha]
variants:
  annealed: {distillation.alpha: 0.5}
  "Wanda, 2:4": {run: prune, sparsity.init: wanda, calibration.samples: 4}
"""
ROW = "another, dense"


@pytest.fixture(scope="module", autouse=True)
def fast_processes() -> Iterator[None]:
    """What the scripts start is a fork of a process that has imported torch."""
    with forked_commands():
        yield


def run_study(*arguments: object) -> Result:
    """Run the command in this process; its variants are separate processes."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line of a wrong input's error."""
    result = run_study(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


def write_inputs(place: Path) -> Path:
    """A base configuration with model and texts, and a study of it."""
    save_tiny_model(place / "model")
    (place / "text.txt").write_text(generated_text())
    (place / "wiki.test.raw").write_text(generated_text(60, seed=3))
    (place / "base.yaml").write_text(BASE.format(place=place))
    (place / "study.yaml").write_text(STUDY)
    return place / "study.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study file, and the folder of its finished run with one further model."""
    place = tmp_path_factory.mktemp("study")
    study, out = write_inputs(place), place / "out"
    save_tiny_model(place / "other", seed=1)
    result = run_study(study, "--out", out, "--row", f"{ROW}={place}/other")
    assert result.exit_code == 0, result.output
    assert "variant 2 of 3: Wanda, 2:4" in result.stdout
    assert "Tiny: 3 of 3 variants" in result.stdout
    return study, out


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_inputs(tmp_path)


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def changed(study: Path, text: str) -> Path:
    study.write_text(text)
    return study


def test_table_has_the_results_of_the_runs_under_the_dense_model(finished: tuple[Path, Path]) -> None:
    _, out = finished
    rows = table(out)
    assert list(rows) == ["dense", "annealed", "Wanda, 2:4", ROW]
    stages = json.loads((out / "annealed" / "results.json").read_text())
    for row, stage in (("dense", "dense"), ("annealed", "retrained 2:4")):
        for name in ("wikitext2", "heldout"):
            assert float(rows[row][name]) == stages[stage][name]["perplexity"]
            assert (rows[row][f"windows_{name}"], rows[row][f"seq_len_{name}"]) == ("3", "32")
    assert float(rows["annealed"]["one_shot_wikitext2"]) == stages["one-shot 2:4"]["wikitext2"]["perplexity"]
    pruned = json.loads((out / "Wanda_2_4" / "eval_wikitext2.json").read_text())["results"][0]
    assert float(rows["Wanda, 2:4"]["wikitext2"]) == pruned["perplexity"] != float(rows["dense"]["wikitext2"])
    assert rows["Wanda, 2:4"]["heldout"] == "" and rows[ROW]["wikitext2"] != ""
    last = json.loads((out / "annealed" / "mask_history.jsonl").read_text().splitlines()[-1])
    row = rows["annealed"]
    assert (row["kind"], row["steps"], row["tokens"], row["seed"]) == ("train", "3", str(3 * 2 * 32), "5")
    assert float(row["flip_rate"]) == last["flip_rate"] and float(row["initial_flip_rate"]) == last["initial_flip_rate"]
    assert float(row["train_loss"]) > 0 and float(row["train_seconds"]) > 0 and float(row["tokens_per_second"]) > 0
    assert all(row[key] for row in rows.values() for key in ("commit", "device", "torch", "transformers"))


def test_committed_files_hold_no_path_of_the_machine(finished: tuple[Path, Path]) -> None:
    study, out = finished
    texts = [(out / name).read_text(encoding="utf-8") for name in ("results.csv", "provenance.json")]
    assert not any(str(study.parent) in text or str(SCRIPTS.parent) in text for text in texts)
    provenance = json.loads(texts[1])
    assert provenance["command"].startswith("python scripts/studies/run.py ") and "--out OUT" in provenance["command"]
    assert [entry["name"] for entry in provenance["variants"]] == ["annealed", "Wanda, 2:4", ROW]


def test_every_figure_with_something_to_show_is_drawn(finished: tuple[Path, Path]) -> None:
    _, out = finished
    for name in ("perplexity", "flips", "losses"):
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
    assert not (out / "alpha.png").exists()  # one α does not make a line


def test_checkpoints_go_and_the_model_stays(finished: tuple[Path, Path]) -> None:
    _, out = finished
    assert not list(out.glob("*/checkpoint-*"))
    assert (out / "annealed" / "model.safetensors").exists()


def test_finished_variants_are_not_run_again(finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    study, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.parent != out}
    (out / "results.csv").unlink()
    result = run_study(study, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("finished before") == 2
    assert list(table(out)) == ["dense", "annealed", "Wanda, 2:4"]  # without --row there is none
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.parent != out} == before


def test_a_record_of_the_first_version_is_taken_up(finished: tuple[Path, Path], tmp_path: Path) -> None:
    study, out = finished
    shutil.copytree(out, tmp_path / "out")
    record = tmp_path / "out" / "annealed.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({key: content[key] for key in content.keys() - {"resolved", "starts"}}))
    result = run_study(study, "--out", tmp_path / "out", "--only", "annealed")
    assert result.exit_code == 0 and result.stdout.count("finished before") == 1, result.output


def test_an_interrupted_variant_continues_from_its_checkpoint(tmp_path: Path) -> None:
    study = changed(write_inputs(tmp_path), "config: base.yaml\nvariants: {only: {}}")
    folder, record = tmp_path / "out" / "only", tmp_path / "out" / "only.json"
    run_training(load_config(tmp_path / "base.yaml"), output_dir=str(folder), echo=lambda line: None)
    uninterrupted = (folder / "model.safetensors").read_bytes()
    for left in ("model.safetensors", "trainer_state.json"):
        (folder / left).unlink()
    shutil.rmtree(folder / "checkpoint-3", ignore_errors=True)
    assert (folder / "checkpoint-2").is_dir()
    made_of: dict[str, Any] = {"config": "base.yaml", "run": "train", "model": None, "settings": {}}
    versions = {"torch": "1", "transformers": "1"}
    begun = {"name": "only", "made_of": made_of, "finished": False, "seconds": 10.0, "commit": "abc", "device": "a CPU"}
    record.write_text(json.dumps({**begun, "versions": versions}))
    result = run_study(study, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (folder / "model.safetensors").read_bytes() == uninterrupted
    assert not list(folder.glob("checkpoint-*"))
    content = json.loads(record.read_text())
    assert content["finished"] and content["starts"] == 2 and content["seconds"] > 10
    assert content["commit"].startswith("abc; ")
    row = table(tmp_path / "out")["only"]
    assert row["steps"] == "3" and row["train_seconds"] == ""  # the trainer timed only the last part


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "distillation.alpha=0.6"], "distillation.alpha was 0.5, and is 0.6"),
        (["--smoke"], "evaluation.windows was not set, and is 2"),
    ],
)
def test_changed_settings_are_refused(finished: tuple[Path, Path], arguments: list[str], said: str) -> None:
    study, out = finished
    assert f"was made with other settings: {said}" in refused(study, "--out", out, *arguments)


def test_an_edited_base_configuration_is_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    study, out = finished
    shutil.copy(study, tmp_path / "study.yaml")
    (tmp_path / "base.yaml").write_text((study.parent / "base.yaml").read_text().replace("seed: 5", "seed: 6"))
    assert "training.seed was 5, and is 6" in refused(tmp_path / "study.yaml", "--out", out)


def test_a_failed_variant_stops_the_study_and_leaves_nothing(finished: tuple[Path, Path]) -> None:
    study, out = finished
    (study.parent / "empty").mkdir(exist_ok=True)
    before = sorted(out.rglob("*"))
    result = run_study(study, "--out", out, "--row", f"bad={study.parent}/empty")
    assert result.exit_code == 2
    assert "Error: bad: ast-eval ended with exit code 2" in result.stderr
    assert list(table(out)) == ["dense", "annealed", "Wanda, 2:4"]
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "seed"], "--set 'seed' is not of the form section.key=value"),
        (["--set", "training.seed=[1"], "--set 'training.seed=[1': the value is not valid YAML"),
        (["--set", "sparsity.patern=2:4"], "variant 'annealed': Unknown key sparsity.patern. Did you mean 'pattern'?"),
        (["--row", "model"], "--row 'model' is not of the form NAME=MODEL"),
        (["--row", "a=b", "--row", "a=c"], "'a' is given twice"),
        (["--row", "annealed=b"], "variants 'annealed' and 'annealed' would share the folder 'annealed'"),
        (["--row", "gone=./gone"], "variant 'gone': model './gone' does not exist"),
        (["--row", "..=b"], "a variant cannot be called '..'"),
        (["--row", "provenance=b"], "a variant cannot be called 'provenance'"),
        (["--only", "static"], "--only 'static' is not a variant of"),
        (["--only", "static"], "Known: annealed, Wanda, 2:4."),
        (["--bad"], "No such option"),
    ],
)
def test_a_wrong_option_ends_in_one_line_and_leaves_nothing(study: Path, arguments: list[str], said: str) -> None:
    before = sorted(study.parent.rglob("*"))
    assert said in refused(study, "--out", study.parent / "out", *arguments)
    assert sorted(study.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty, not a mapping"),
        ("config: base.yaml\nvariants: {a: {}}\nrows: 1", "unknown key 'rows'. Known: title, config"),
        ("config: base.yaml", "`config` (a file) and `variants` (settings by name) are needed"),
        ("config: base.yaml\nvariants: {}", "`variants` is empty"),
        ("config: gone.yaml\nvariants: {a: {}}", "gone.yaml' does not exist"),
        ("config: base.yaml\nvariants: {a: {run: test}}", "variants.a.run='test' is unknown. Use train, prune, eval"),
        ("config: base.yaml\nvariants: {a: {model: b}}", "variants.a.model='b' names a model for `run: eval`"),
        ("config: base.yaml\nvariants: {a b: {}, a_b: {}}", "variants 'a b' and 'a_b' would share the folder 'a_b'"),
        ("config: base.yaml\nvariants: {a: {}}\nfigures: [pie]", "figures=['pie'] is not a list of perplexity, flips"),
        ("config: base.yaml\nset: 1\nvariants: {a: {}}", "`set` is an integer, not settings by name"),
        (
            "config: base.yaml\nvariants: {a: {}, b: {run: prune, evaluation.datasets: [heldout]}}",
            "variant 'b': evaluation.datasets=['heldout'] has no text for `run: prune`",
        ),
        (
            "config: base.yaml\nvariants: {a: {run: prune, sparsity.init: wanda, calibration.data: [{path: x}]}}",
            "calibrates on files, and {'path': 'x'} is not a file",
        ),
        (
            "config: base.yaml\nvariants: {a: {run: prune, sparsity.init: wanda, data.train: null, "
            "data.domains: {d: {train: text.txt, share: 1.0}}}}",
            "calibrates on files, and data.train is not set. Set calibration.data.",
        ),
        (
            "config: base.yaml\nvariants: {a: {run: prune, evaluation.datasets: [a/t.txt, b/t.txt]}}",
            "evaluation.datasets has two texts called 't'",
        ),
        (
            "config: base.yaml\nvariants: {a: {run: eval, model.config_overrides: {rms_norm_eps: 1.0}}}",
            "model.config_overrides={'rms_norm_eps': 1.0} does not reach `run: eval`",
        ),
    ],
)
def test_a_wrong_study_ends_in_one_line_before_anything_is_run(study: Path, text: str, said: str) -> None:
    changed(study, text)
    before = sorted(study.parent.rglob("*"))
    assert said in refused(study, "--out", study.parent / "out")
    assert sorted(study.parent.rglob("*")) == before


def test_missing_study_out_and_foreign_folders_are_refused(study: Path) -> None:
    out = study.parent / "out"
    assert "is not a file. Name a YAML file" in refused(study.parent / "gone.yaml", "--out", out)
    assert "--out is missing" in refused(study)
    assert "is a file. Name a folder" in refused(study, "--out", study)
    (out / "annealed").mkdir(parents=True)
    (out / "annealed" / "mine.txt").write_text("kept")
    assert "is not part of this study" in refused(study, "--out", out)
    assert "`smoke` is missing" in refused(changed(study, "config: base.yaml\nvariants: {a: {}}"), "--smoke", "--list")


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_study_is_valid_in_both_sizes(name: str) -> None:
    path = SCRIPTS / "studies" / f"{name}.yaml"
    full, smoke = (read_study(path, {}, small, {}) for small in (False, True))  # raises where a variant is wrong
    assert len(full.variants) >= 2 and full.figures
    assert all(variant.config.training["max_steps"] <= 8 for variant in smoke.variants)
    assert [variant.name for variant in full.variants] == [variant.name for variant in smoke.variants]
    told_apart = [json.dumps([variant.kind, variant.config.to_dict()]) for variant in full.variants]
    assert len({*told_apart}) == len(told_apart), "two variants are the same run"
    listed = run_study(path, "--list")
    assert listed.exit_code == 0 and all(variant.name in listed.stdout for variant in full.variants)


def test_an_override_does_not_switch_on_what_a_variant_leaves_out() -> None:
    given = {"distillation.temperature": 2.0}
    study = read_study(SCRIPTS / "studies" / "table4.yaml", given, False, {})
    found = {variant.name: variant.config.distillation for variant in study.variants}
    assert found["no distillation"] is None and found["naive"] is None
    assert found["AST"] is not None and found["AST"].temperature == 2.0
    shown = {variant.name for variant in study.variants if "distillation.temperature" in variant.settings}
    assert shown == {name for name, section in found.items() if section is not None}
    whole = read_study(SCRIPTS / "studies" / "table4.yaml", {"distillation": {"alpha": 0.5}, **given}, False, {})
    assert {each.config.distillation.temperature for each in whole.variants if each.config.distillation} == {2.0}
    assert all(each.config.distillation is not None for each in whole.variants)


def test_every_shipped_study_is_tested() -> None:
    assert {path.stem for path in (SCRIPTS / "studies").glob("*.yaml")} == SHIPPED


def test_an_override_without_effect_on_any_variant_is_refused(study: Path) -> None:
    changed(study, "config: base.yaml\nvariants: {a: {distillation: null}, b: {run: prune}, c: {run: eval}}")
    line = refused(study, "--list", "--set", "distillation.alpha=0.6")
    assert line.startswith(f"Error: --set distillation.alpha=0.6 has no effect on any variant of {study}: each is not")
    assert run_study(study, "--list", "--set", "training.max_steps=5").exit_code == 0  # it reaches a
    changed(study, "config: base.yaml\nvariants: {b: {run: prune}, c: {run: eval}}")
    for setting in ("training.max_steps=5", "sparsity.mask_interval=2"):
        assert f"--set {setting} has no effect" in refused(study, "--list", "--set", setting)
    # c does not read the third one, and the last one is so already
    for setting in ("evaluation.windows=2", "training.use_cpu=false", "sparsity.pattern=1:4", "evaluation.windows=3"):
        assert run_study(study, "--list", "--set", setting).exit_code == 0
