"""The internals of transformers that training relies on are in one table, and the installed version has them all."""

import ast
import inspect
from pathlib import Path

import pytest
import transformers
from transformers import PreTrainedConfig, Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import ast_sparse
from ast_sparse.training.checkpointing import CONFIG_INTERNALS, TRAINER_INTERNALS, TRANSFORMERS_VERSION, Internal
from ast_sparse.training.trainer import SparseTrainer

PACKAGE = Path(inspect.getfile(ast_sparse)).parent
CLASSES = SparseTrainer.__mro__[: SparseTrainer.__mro__.index(Trainer)]
VERSIONS = f"transformers is {transformers.__version__}, the table was checked against {TRANSFORMERS_VERSION}"
ELSEWHERE = {"_exit", "_replace"}  # of `os` and of a named tuple: documented despite their names
OF_TRACKERS = {"_log_model"}  # whether one uploads the model; there is no public way to ask


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(kind: type) -> set[str]:
    """Private methods and attributes of a class, including those that its methods set, read or call."""
    tree = ast.parse(inspect.getsource(kind))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_its_own(node.value)}
    return {name for name in used | set(vars(kind)) if is_private(name)}


def is_its_own(node: ast.expr) -> bool:
    """Whether an expression is `self` or `super()`."""
    name = node.func if isinstance(node, ast.Call) else node
    return isinstance(name, ast.Name) and name.id in ("self", "super")


@pytest.mark.parametrize("row", TRAINER_INTERNALS, ids=lambda row: row.name)
def test_the_installed_trainer_has_it(row: Internal) -> None:
    assert row.why
    if row.parameters is None:
        assert row.name in own_names(Trainer), VERSIONS
    else:
        assert tuple(inspect.signature(getattr(Trainer, row.name)).parameters)[1:] == row.parameters, VERSIONS


@pytest.mark.parametrize("row", TRAINER_INTERNALS, ids=lambda row: row.name)
def test_an_override_takes_what_trainer_passes(row: Internal) -> None:
    if row.parameters is not None:
        assert tuple(inspect.signature(getattr(SparseTrainer, row.name)).parameters)[1:] == row.parameters


def test_a_configuration_has_it() -> None:
    for row in CONFIG_INTERNALS:
        assert row.why and hasattr(PreTrainedConfig(), row.name), VERSIONS


@pytest.mark.parametrize("tracker", ["wandb", "dvclive"])
def test_the_installed_trackers_have_it(tracker: str) -> None:
    assert own_names(INTEGRATION_TO_CALLBACK[tracker]) >= OF_TRACKERS, VERSIONS


def test_no_other_private_name_of_trainer_is_overridden_or_used() -> None:
    """So this also finds one of our names that a new version of Trainer starts to use."""
    ours = set().union(*(own_names(kind) for kind in CLASSES))
    known = {row.name for row in TRAINER_INTERNALS if is_private(row.name)}
    assert ours & own_names(Trainer) == known, VERSIONS


@pytest.mark.parametrize("room", ["training", "run"])
def test_no_file_uses_private_names_of_anything_else(room: str) -> None:
    known = {row.name for row in CONFIG_INTERNALS} | ELSEWHERE | OF_TRACKERS
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_its_own(node.value):
                assert node.attr in known, f"{path.relative_to(PACKAGE)}, line {node.lineno}: {ast.unparse(node)}"


def test_no_file_imports_private_names_of_transformers_or_accelerate() -> None:
    for path in sorted(file for room in ("training", "run") for file in (PACKAGE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("transformers", "accelerate")):
                assert not [alias.name for alias in node.names if is_private(alias.name)], path
