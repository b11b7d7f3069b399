"""The public API matches the list, at run time and for type checkers."""

import ast
from pathlib import Path

import pytest
from mypy import api as mypy

import ast_sparse
from tests.public_api import api_lines

LIST = Path(__file__).with_suffix(".txt").with_stem("public_api")
PACKAGE = Path(ast_sparse.__file__).parent
# Only this package is checked: the libraries it uses would take minutes.
MYPY = """
[mypy]
follow_imports = skip
ignore_missing_imports = true
[mypy-ast_sparse.*]
follow_imports = silent
"""


def test_names_flags_keys_and_files_are_those_of_the_list() -> None:
    listed = LIST.read_text(encoding="utf-8").splitlines()
    found = api_lines()
    lost, added = (sorted(set(one) - set(other)) for one, other in ((listed, found), (found, listed)))
    assert found == listed, (
        f"{len(lost)} lines of tests/public_api.txt are lost: {lost}; {len(added)} are new: {added}. If that is meant, "
        "run: python -m tests.public_api > tests/public_api.txt"
    )


def test_type_checkers_get_every_public_name_from_the_file_that_defines_it() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    shown = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names:
            assert alias.asname == alias.name, f"`{alias.name} as {alias.name}` says that it is passed on"
            shown[alias.name] = node.module.removeprefix("ast_sparse.")
    assert shown == ast_sparse._PUBLIC


def test_a_type_checker_sees_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (PACKAGE / "py.typed").is_file()
    (tmp_path / "use.py").write_text(
        "import ast_sparse\nreveal_type(ast_sparse.SparseTrainer)\nast_sparse.SparseTrainr\n", encoding="utf-8"
    )
    (tmp_path / "mypy.ini").write_text(MYPY, encoding="utf-8")
    monkeypatch.setenv("MYPYPATH", str(PACKAGE.parent))
    monkeypatch.chdir(tmp_path)
    output, errors, _ = mypy.run(["--config-file", "mypy.ini", "--cache-dir", "cache", "use.py"])
    lines = output.splitlines()
    assert len(lines) == 3, f"{output}{errors}"  # the type, the error, the sum of them
    assert lines[0].endswith('-> ast_sparse.training.trainer.SparseTrainer"')
    assert 'has no attribute "SparseTrainr"' in lines[1]
