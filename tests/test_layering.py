"""Every import points down: each room has its own rank, so no two rooms can import each other."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import ast_sparse

PACKAGE = Path(__file__).parents[1] / "ast_sparse"
# A room may import from itself and from rooms further down.
ORDER = (
    "cli",
    "run",
    "planning",
    "speed",
    "report",
    "training",
    "evaluation",
    "data",
    "serving",
    "export",
    "distillation",
    "basis",
    "sparsity",
    "storage",
    "optim",
    "schedules",
    "kernels",
    "config",
    "distributed",
    "tables",
    "progress",
    "peak",
    "errors",
)
RANK = {room: len(ORDER) - level for level, room in enumerate(ORDER)}
STRANGERS = {("report", "training")}  # neither imports the other
TORCH_ONLY = ("kernels", "sparsity", "optim", "schedules", "distillation", "export/codec")
NAMED_BY_THEIR_ROOM = (
    "cli",
    "config",
    "checks",
    "callbacks",
)  # one file per command, section or subject
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
            assert (room(path), parts[1]) not in STRANGERS, f"{path.name} imports {name}"


def test_the_order_names_every_room_once() -> None:
    rooms = {room(path) for path in FILES}
    assert len(set(ORDER)) == len(ORDER)
    assert rooms == set(ORDER)


def test_no_two_rooms_have_a_file_of_one_name() -> None:
    places = defaultdict(set)
    for path in FILES:
        if path.name != "__init__.py" and path.parent.name not in NAMED_BY_THEIR_ROOM:
            places[path.name].add(str(path.relative_to(PACKAGE)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_an_init_file_is_empty_or_only_names_what_is_public() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        if path.parent not in (PACKAGE, PACKAGE / "config"):
            assert not [node for node in ast.parse(path.read_text(encoding="utf-8")).body if not is_docstring(node)], (
                path
            )


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_training_is_one_room_of_twelve_entries_at_most() -> None:
    assert len([path for path in (PACKAGE / "training").iterdir() if path.name != "__pycache__"]) <= 12


FINDS_A_LIBRARY = ("kernels/native/compiling.py", "kernels/native/library.py")  # of C: a file beside or in a cache
MATHEMATICS = [path for path in FILES if str(path.relative_to(PACKAGE)).startswith(TORCH_ONLY)]


@pytest.mark.parametrize("path", MATHEMATICS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_mathematics_knows_nothing_of_trainer_files_or_commands(path: Path) -> None:
    files = () if str(path.relative_to(PACKAGE)) in FINDS_A_LIBRARY else ("pathlib",)
    for name in imports(path):
        assert not name.startswith(("click", "yaml", "datasets", "accelerate", "transformers.Trainer", *files)), name


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(ast_sparse, name) is not None for name in ast_sparse.__all__)
