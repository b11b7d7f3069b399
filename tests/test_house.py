"""The size of files and functions, so that each can be read in one go."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES = 400, 50
REASON = "# long: "  # on the line above a longer function (above its decorators), and why it is one
FILES = {room: sorted((ROOT / room).rglob("*.py")) for room in ("ast_sparse", "scripts", "tests")}


@pytest.mark.parametrize("room", FILES)
def test_no_file_is_too_long(room: str) -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES[room]}
    assert lines
    assert not [f"{path.relative_to(ROOT)}: {count}" for path, count in lines.items() if count > FILE_LINES]


@pytest.mark.parametrize("room", ["ast_sparse", "scripts"])
def test_no_function_is_too_long_without_a_reason(room: str) -> None:
    found = []
    for path in FILES[room]:
        source = path.read_text(encoding="utf-8")
        for name, count in long_functions(source):
            found.append(f"{path.relative_to(ROOT)}, {name}: {count}")
    assert not found


def long_functions(source: str) -> list[tuple[str, int]]:
    """Functions with more lines than allowed, not counting docstrings, and without a reason above them."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if count > FUNCTION_LINES and not has_reason(lines[first - 2] if first > 1 else ""):
                found.append((node.name, count))
    return found


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    if ast.get_docstring(node) is None:
        return 0
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1


def has_reason(line: str) -> bool:
    return line.strip().startswith(REASON) and bool(line.split(REASON, 1)[1].strip())


def test_a_long_function_is_found_unless_its_reason_stands_above_it() -> None:
    body = "".join(f"    a{number} = {number}\n" for number in range(FUNCTION_LINES))
    assert long_functions(f"def f():\n{body}") == [("f", FUNCTION_LINES + 1)]
    assert long_functions(f"# long: a table\n@cache\ndef f():\n{body}") == []
    assert long_functions(f"# long:\ndef f():\n{body}") != []
    short = body.split("\n", 1)[1]
    assert long_functions(f'def f():\n    """One\n\n    two.\n    """\n{short}') == []
