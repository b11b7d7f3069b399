"""Studies: seeds of a variant, curves of perplexity against tokens and time, and the options of one-shot rows."""

import csv
from pathlib import Path
from typing import Any

import pytest

from ast_sparse.config import load_config
from ast_sparse.errors import UserError
from ast_sparse.storage.files import write_json
from scripts.studies import figures, results
from scripts.studies.curves import work_seconds, write_curves
from scripts.studies.figures import draw
from scripts.studies.results import Outcome, results_table, table_rows
from scripts.studies.variants import Study, Variant, commands, read_study

BASE = """
model: {name_or_path: model}
data: {train: [text.txt], block_size: 32, seed: 7}
training: {max_steps: 3, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, seed: 5}
evaluation: {datasets: [wikitext2], steps: 2}
"""
STUDY = """
config: base.yaml
seeds: [3, 4]
variants:
  a: {}
  b c: {run: prune, sparsity.init: wanda}
  dense: {run: eval}
"""
PER_STEP = 2 * 2 * 32


def read(folder: Path, text: str = STUDY, base: str = BASE, **overrides: Any) -> Study:
    (folder / "base.yaml").write_text(base)
    (folder / "study.yaml").write_text(text)
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return read_study(folder / "study.yaml", given, False, {})


def wikitext2(perplexity: float) -> Any:
    return {"wikitext2": {"perplexity": perplexity, "windows": 2, "seq_len": 32}}


def trained(variant: Variant, log: list[dict[str, Any]], steps: int = 5, **values: Any) -> Outcome:
    """A made-up run of `steps` steps from perplexity 100 to 50."""
    state = {"global_step": steps, "train_batch_size": 2, "log_history": log}
    record = {"seconds": 1.0, "commit": "abc", "device": "a CPU", "versions": {"torch": "1", "transformers": "1"}}
    shown: dict[str, Any] = {"dense": wikitext2(20.0), "one_shot": wikitext2(100.0), "final": wikitext2(50.0)}
    return Outcome(variant=variant, record=record, state=state, **{**shown, "one_shot_name": "one-shot 2:4", **values})


def speed(step: int, seconds_per_step: float) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "tokens_per_second": PER_STEP / seconds_per_step}


def test_each_run_is_made_once_per_seed(tmp_path: Path) -> None:
    study = read(tmp_path)
    assert [variant.label for variant in study.variants][:3] == ["a, seed 3", "a, seed 4", "b c, seed 3"]
    assert [variant.folder for variant in study.variants][2:] == ["b_c_seed_3", "b_c_seed_4", "dense"]
    first = study.variants[0]
    assert first.config == load_config(tmp_path / "base.yaml", ["training.seed=3", "calibration.seed=3"])
    assert (first.name, first.config.data.seed, "data_seed" in first.config.training) == ("a", 7, False)
    line = commands(study, study.variants[1], tmp_path / "out")[0]
    assert "training.seed=4" in line and "calibration.seed=4" in line
    line = commands(study, study.variants[3], tmp_path / "out")[0]
    assert line[line.index("--seed") + 1] == "4"
    ordered = read(tmp_path, base=BASE.replace("seed: 5", "seed: 5, data_seed: 9"))
    assert ordered.variants[1].config.training["data_seed"] == 4


def test_a_study_without_seeds_has_the_folders_and_settings_it_had(tmp_path: Path) -> None:
    study = read(tmp_path, STUDY.replace("seeds: [3, 4]\n", ""))
    assert [(variant.label, variant.folder, variant.settings) for variant in study.variants] == [
        ("a", "a", {}), ("b c", "b_c", {"sparsity.init": "wanda"}), ("dense", "dense", {}),
    ]  # fmt: skip
    assert study.variants[0].config.training["seed"] == 5


@pytest.mark.parametrize("seeds", ["[]", "[1, 1]", "[true]", "[-1]", "[1.5]", "3"])
def test_wrong_seeds_are_refused(tmp_path: Path, seeds: str) -> None:
    with pytest.raises(UserError, match="is not a list of different whole numbers"):
        read(tmp_path, STUDY.replace("[3, 4]", seeds))


def test_a_seed_that_would_be_replaced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"variant 'a': training\.seed=1 would be replaced by each of `seeds`"):
        read(tmp_path, training__seed=1)


def test_rows_of_a_table_show_the_seed(tmp_path: Path) -> None:
    outcomes = [trained(variant, []) for variant in read(tmp_path).variants[:2]]
    assert [(row["variant"], row["seed"]) for row in table_rows(outcomes)][-2:] == [("a", 3), ("a", 4)]
    assert results_table(outcomes).splitlines()[0].split()[:2] == ["variant", "seed"]


def test_time_is_that_of_the_start_and_of_the_steps(tmp_path: Path) -> None:
    variant = read(tmp_path).variants[0]
    every_step = trained(variant, [speed(step, step) for step in (1, 2, 3)], start_seconds=10.0)
    assert [work_seconds(every_step, step) for step in (0, 1, 2, 3)] == pytest.approx([10, 11, 13, 16])
    # one record for two steps; the last step has none, and takes the time of those before it
    every_second = trained(variant, [speed(2, 1.0), speed(4, 3.0)], start_seconds=0.0)
    assert [work_seconds(every_second, step) for step in (1, 2, 3, 5)] == pytest.approx([1, 2, 5, 11])
    assert work_seconds(trained(variant, []), 2) is None
    assert work_seconds(trained(variant, [speed(1, 1.0)], start_seconds=None), 1) is None


def test_curves_begin_with_the_one_shot_model_and_end_with_the_saved_one(tmp_path: Path) -> None:
    variants = read(tmp_path).variants
    measured = [{"step": step, "wikitext2_perplexity": 90.0 - step} for step in (2, 4)]
    log = [*(speed(step, 2.0) for step in range(1, 5)), *measured]
    outcomes = [trained(variant, log, steps=4, start_seconds=6.0) for variant in variants[:2]]
    outcomes.append(trained(variants[2], [], final=wikitext2(80.0)))
    assert write_curves(outcomes, tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["variant", "seed", "dataset", "step", "tokens", "seconds", "perplexity"]
    assert rows[1:4] == [
        ["a", "3", "wikitext2", "0", "0", "6.0", "100.0"],
        ["a", "3", "wikitext2", "2", str(2 * PER_STEP), "10.0", "88.0"],
        ["a", "3", "wikitext2", "4", str(4 * PER_STEP), "14.0", "50.0"],  # not 86, measured before the end
    ]
    assert [row[1] for row in rows[4:]] == ["4"] * 3
    assert draw("curves", outcomes, tmp_path / "curves.png") and (tmp_path / "curves.png").stat().st_size > 1000
    unmeasured = [trained(variants[0], [speed(1, 1.0)])]
    assert not write_curves(unmeasured, tmp_path / "curves.csv") and not (tmp_path / "curves.csv").exists()
    assert not draw("curves", unmeasured, tmp_path / "curves.png") and not (tmp_path / "curves.png").exists()


def test_losses_beside_the_perplexity_of_a_file_show_the_dense_model(tmp_path: Path) -> None:
    shown: dict[str, Any] = {
        stage: {"texts/val.txt": {"perplexity": perplexity, "windows": 2, "seq_len": 32}}
        for stage, perplexity in (("dense", 20.0), ("one_shot", 100.0), ("final", 50.0))
    }
    log = [speed(1, 1.0), speed(2, 1.0), {"step": 2, "val_perplexity": 60.0}]
    figure = figures._losses([trained(read(tmp_path).variants[0], log, **shown)])
    assert figure is not None
    panel = figure.axes[1]
    assert [text.get_text() for text in panel.texts] == ["dense 20.0"]
    assert panel.get_ylabel() == "perplexity, val.txt\n(2 windows of 32 tokens)"


def test_seconds_of_the_start_come_from_its_record(tmp_path: Path) -> None:
    variants = "{a: {}, b: {sparsity.init: sparsegpt}, c: {basis.permute: true}}"
    study = read(tmp_path, f"config: base.yaml\nvariants: {variants}")
    assert [results._start_seconds(variant, tmp_path) for variant in study.variants] == [0.0, None, None]
    (tmp_path / "start").mkdir()
    write_json(tmp_path / "start" / "start.json", {"seconds": 12.5})
    assert results._start_seconds(study.variants[1], tmp_path) == 12.5
    write_json(tmp_path / "start" / "start.json", {"seconds": None})  # continued after a kill
    assert results._start_seconds(study.variants[1], tmp_path) is None


def test_one_shot_and_measured_rows_have_the_bos_of_training(tmp_path: Path) -> None:
    text = "config: base.yaml\nvariants: {a: {run: prune, sparsity.init: wanda}, b: {run: eval}, c: {run: prune}}"
    study = read(tmp_path, text, data__bos="block")
    prune, *measured = (line for variant in study.variants[:2] for line in commands(study, variant, tmp_path))
    assert [line[line.index("--bos") + 1] for line in (prune, *measured)] == ["block"] * 3
    assert "--bos" not in commands(study, study.variants[2], tmp_path)[0]  # magnitude reads no text


def test_one_shot_and_measured_rows_use_the_device_of_training(tmp_path: Path) -> None:
    text = "config: base.yaml\nvariants: {a: {run: prune}, b: {run: eval}}"
    for overrides, expected in (({}, 0), ({"training__use_cpu": True}, 1)):
        study = read(tmp_path, text, **overrides)
        lines = [line for variant in study.variants for line in commands(study, variant, tmp_path)]
        assert [line.count("--device") for line in lines] == [expected] * 3
        assert all(line[line.index("--device") + 1] == "cpu" for line in lines if expected)


def test_one_shot_rows_pass_recovery_and_change_of_basis(tmp_path: Path) -> None:
    plain, full = (
        commands(study, study.variants[0], tmp_path)[0]
        for settings in ("", ", calibration.recovery_epochs: 2, basis: {permute: true, rotation_steps: 60}")
        for study in [read(tmp_path, f"config: base.yaml\nvariants: {{a: {{run: prune{settings}}}}}")]
    )
    assert not [option for option in plain if option.startswith(("--recovery", "--permute", "--rotation", "--calib"))]
    assert not {"--samples", "--seed", "--damping", "--block-size"} & {*plain}  # they would have no effect
    assert {"--samples", "--damping"} <= {*full} and "--block-size" not in full
    assert "--permute" in full and "--calibration" in full  # magnitude needs no text, the change of basis does
    for option, value in (("--recovery-epochs", "2"), ("--recovery-batch-size", "4"), ("--rotation-steps", "60")):
        assert full[full.index(option) + 1] == value
    with pytest.raises(UserError, match=r"basis\.rotation_share=0\.5 does not reach `run: prune`"):
        basis = "{rotation_steps: 9, rotation_share: 0.5}"
        read(tmp_path, f"config: base.yaml\nvariants: {{a: {{run: prune, basis: {basis}}}}}")


def test_one_shot_rows_pass_slorb_and_zeros_that_stay(tmp_path: Path) -> None:
    text = """
config: base.yaml
variants:
  a: {run: prune, sparsity.init: sparsegpt, slorb: {k: 8, init: svd}, calibration.keep_zeros: true}
  b: {run: prune, sparsity.init: wanda, slorb: {enabled: false}, calibration.keep_zeros: true}
"""
    study = read(tmp_path, text)
    first, second = (commands(study, variant, tmp_path)[0] for variant in study.variants)
    assert first[first.index("--slorb-k") + 1] == "8" and "--keep-zeros" in first
    assert not {"--slorb-k", "--keep-zeros"} & {*second}  # Wanda always keeps them


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("run: prune, sparsity.init: sparsegpt, slorb: {init: mean}", r"slorb\.init='mean' .* where it is 'svd'"),
        ("run: prune, slorb: {train_projection: false}", r"slorb\.train_projection=False does not reach `run: prune`"),
        ("run: prune, model.random_weights: true", r"model\.random_weights=True does not reach `run: prune`"),
        ("run: eval, model.random_weights: true", r"model\.random_weights=True does not reach `run: eval`"),
    ],
)
def test_what_a_one_shot_or_measured_row_cannot_have_is_refused(tmp_path: Path, settings: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, f"config: base.yaml\nvariants: {{a: {{{settings}}}}}")
