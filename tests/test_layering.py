"""Imports point downwards only (README, "Rooms")."""

import ast
from pathlib import Path

import pytest

import ast_sparse

PACKAGE = Path(__file__).parents[1] / "ast_sparse"
# A room may import from itself and from rooms further down.
ORDER = [
    ("cli",),
    ("training", "evaluation", "export", "loading", "places"),
    ("data",),
    ("distillation", "optim"),
    ("sparsity",),
    ("schedules", "kernels", "quantized"),
    ("dtypes",),
    ("config",),
    ("conversion",),
    ("yaml12",),
    ("progress",),
    ("errors",),
]
RANK = {room: len(ORDER) - level for level, rooms in enumerate(ORDER) for room in rooms}
TORCH_ONLY = ("kernels", "sparsity", "optim", "schedules", "distillation", "export/codec")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    assert room(path) in RANK, f"{room(path)} has no place in the order of rooms"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "ast_sparse" and len(parts) > 1 and parts[1] in RANK:
            assert RANK[parts[1]] <= RANK[room(path)], f"{path.name} imports {name}"


MATHEMATICS = [path for path in FILES if str(path.relative_to(PACKAGE)).startswith(TORCH_ONLY)]


@pytest.mark.parametrize("path", MATHEMATICS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_mathematics_knows_nothing_of_trainer_files_or_commands(path: Path) -> None:
    for name in imports(path):
        assert not name.startswith(("click", "yaml", "datasets", "accelerate", "pathlib", "transformers.Trainer")), name


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(ast_sparse, name) is not None for name in ast_sparse.__all__)
