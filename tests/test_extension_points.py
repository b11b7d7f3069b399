"""What a new one-shot method and a new decay placement need: their functions, and an entry in the table of names.

A made-up one that is added this way works in the commands and in training like those of the package.
"""

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import click
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from ast_sparse import CalibrationConfig, SparsityConfig, UserError
from ast_sparse.cli import prune
from ast_sparse.config.sparsity import METHOD_HELP, Method
from ast_sparse.kernels import updates
from ast_sparse.kernels.updates import PLACEMENTS
from ast_sparse.sparsity.masks import Pattern
from ast_sparse.sparsity.model import sparse_layers
from ast_sparse.sparsity.oneshot import METHODS, OneShotMethod, prune_layer
from ast_sparse.sparsity.select import select_layers
from ast_sparse.sparsity.statistics import InputStatistics
from ast_sparse.storage.load import load_causal_lm
from tests.models import generated_text, save_tiny_model
from tests.training.small_runs import trainer


def choices(field: str) -> tuple[str, ...]:
    return get_args(get_type_hints(SparsityConfig)[field])


def allow(patch: pytest.MonkeyPatch, field: str, name: str) -> None:
    """Add a name to those that a setting takes, as an edit of its Literal would."""
    patch.setitem(SparsityConfig.__annotations__, field, Literal[(*choices(field), name)])


def test_every_one_shot_method_has_a_name_a_line_of_help_and_an_entry() -> None:
    assert set(METHODS) == set(METHOD_HELP) == set(get_args(Method))
    assert choices("init") == choices("criterion") == get_args(Method)


def test_no_option_of_prune_but_the_method_lists_methods() -> None:
    options = [each for each in prune.main.params if isinstance(each, click.Option) and each.name != "method"]
    named = [(each.name, [name for name in METHOD_HELP if name in str(each.help)]) for each in options]
    assert not [(option, names) for option, names in named if len(names) > 1]  # a new method would not be among them


def test_one_method_alone_is_what_a_refresh_by_magnitude_does() -> None:
    assert [name for name, method in METHODS.items() if method.by_magnitude] == ["magnitude"]


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(1, 2, structured=False)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_what_the_pattern_says_and_reports_a_share_as_error(
    method: Method, pattern: Pattern
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    statistics = InputStatistics(32, METHODS[method].needs_hessian, torch.device("cpu"))
    statistics.add(torch.randn(64, 32, generator=generator))
    result = prune_layer("x", weight, method, pattern, statistics)
    assert pattern.holds(torch.where(result.mask, result.weight, 0)) and 0 < result.error < 1
    if pattern.structured:
        assert bool((result.mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all())


def lowest(weight: Tensor, pattern: Pattern, statistics: Any, settings: CalibrationConfig) -> tuple[Tensor, Tensor]:
    """The opposite of magnitude, so that no other method has its mask; twice the weight."""
    scores = weight.abs() if statistics is None else weight.abs() * statistics.input_norm
    return 2 * weight, pattern.mask(-scores)


@pytest.fixture(params=["weights", "norms", "hessian"])
def lowest_method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OneShotMethod:
    method = OneShotMethod(lowest, needs=request.param)
    monkeypatch.setitem(METHODS, "lowest", method)
    monkeypatch.setitem(METHOD_HELP, "lowest", "the smallest |W|")
    for field in ("init", "criterion"):
        allow(monkeypatch, field, "lowest")
    option = next(parameter for parameter in prune.main.params if parameter.name == "method")
    monkeypatch.setattr(option, "type", click.Choice(list(METHOD_HELP)))
    return method


def test_a_new_method_prunes_by_command(lowest_method: OneShotMethod, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(generated_text())
    text = ["--calibration", str(tmp_path / "text.txt"), "--samples", "4", "--seq-len", "16"]
    given = [str(tmp_path / "model"), str(tmp_path / "out"), "--method", "lowest", "--dtype", "float32"]
    result = CliRunner().invoke(prune.main, given + (text if lowest_method.needs_text else []))
    assert result.exit_code == 0, result.output
    assert ("outputs on the calibration text" in result.stdout) is lowest_method.needs_text
    found, dense = load_causal_lm(tmp_path / "out"), load_causal_lm(tmp_path / "model")
    for name, layer in select_layers(found)[0].items():
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], 2 * dense.get_parameter(f"{name}.weight")[kept])
        if not lowest_method.needs_text:
            assert torch.equal(kept, Pattern(2, 4).mask(-dense.get_parameter(f"{name}.weight").abs()))
    assert json.loads((tmp_path / "out" / "sparsity_config.json").read_text())["one_shot"]["method"] == "lowest"


def test_training_starts_from_a_new_method_and_its_mask_lasts(lowest_method: OneShotMethod, tmp_path: Path) -> None:
    sparsity = SparsityConfig(init="lowest", mask_interval=2, mask_decay=1e-4)  # type: ignore[arg-type]
    run = trainer(
        tmp_path, None, sparsity, calibration_config=CalibrationConfig(samples=4),
        args={"max_steps": 2, "learning_rate": 1e-5},
    )  # fmt: skip
    starts = {name: layer.mask.clone() for name, layer in sparse_layers(run.model).items()}
    assert not all(
        torch.equal(mask, Pattern(2, 4).mask(run.teacher.get_parameter(f"{name}.weight").abs()))  # type: ignore[union-attr]
        for name, mask in starts.items()
    )
    run.train()
    (row,) = [json.loads(line) for line in (tmp_path / "mask_history.jsonl").read_text().splitlines()]
    assert row["flip_rate"] < 0.05


def test_masks_are_refreshed_by_a_new_method(lowest_method: OneShotMethod, tmp_path: Path) -> None:
    sparsity = SparsityConfig(criterion="lowest", mask_interval=2, mask_decay=1e-4)  # type: ignore[arg-type]
    run = trainer(tmp_path, None, sparsity, args={"max_steps": 2, "learning_rate": 1e-5})
    run.train()
    (row,) = [json.loads(line) for line in (tmp_path / "mask_history.jsonl").read_text().splitlines()]
    assert row["flip_rate"] > 0.9  # from the largest weights to the smallest


def test_a_misspelt_new_method_is_suggested(lowest_method: OneShotMethod) -> None:
    with pytest.raises(UserError, match="Did you mean 'lowest'"):
        SparsityConfig(init="lowst")  # type: ignore[arg-type]


def test_the_error_of_a_new_method_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("it cannot be pruned. Exclude it.")

    monkeypatch.setitem(METHODS, "wanda", OneShotMethod(fail, needs="weights"))
    with pytest.raises(UserError, match=r"`model\.layers\.0\..*`: it cannot be pruned\. Exclude it\."):
        trainer(tmp_path, None, SparsityConfig(init="wanda"))


def test_every_decay_placement_has_a_name_and_its_update_functions() -> None:
    assert set(PLACEMENTS) == set(choices("decay_placement"))


def test_a_new_decay_placement_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def reversed_eager(w: Tensor, g: Tensor, mask: Tensor, first: Tensor, second: Tensor, values: Any) -> None:
        calls.append(values.mask_decay)
        updates._weight_eager(w, g, ~mask, first, second, values)

    monkeypatch.setitem(PLACEMENTS, "reversed", (reversed_eager, PLACEMENTS["weight"][1]))
    allow(monkeypatch, "decay_placement", "reversed")
    sparsity = SparsityConfig(decay_placement="reversed", decay_schedule="static", kernels="eager")  # type: ignore[arg-type]
    run = trainer(tmp_path, None, sparsity, args={"max_steps": 1})
    run.train()
    assert set(calls) == {sparsity.mask_decay}
